-- Tells what a gateway knows of a count and the server does not.
--
-- KEYS: a mark that it was told, and the count. ARGV: who we are; what it is told ("parts" of a window, that money is
-- spent "at least" or "more", what is "held"); of a window the microseconds of a part, else how many seconds the count
-- is kept; then how many parts ago and an amount, of a window for each of its parts.
local PARTS, TOLD_KEPT = 256, 600
if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', TOLD_KEPT) then return {} end
local key, me, how, extra = KEYS[2], ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
if how == 'at least' then
  local known = tonumber(redis.call('HGET', key, 'spent') or 0)
  if known < tonumber(ARGV[5]) then redis.call('HSET', key, 'spent', ARGV[5]) end
elseif how == 'more' then
  redis.call('HINCRBY', key, 'spent', ARGV[5])
elseif how == 'held' then
  if ARGV[5] == '0' then
    redis.call('HDEL', key, 'g:' .. me, 't:' .. me)
  else
    redis.call('HSET', key, 'g:' .. me, ARGV[5], 't:' .. me, time[1])
  end
end
if how ~= 'parts' then
  redis.call('EXPIRE', key, extra)
  return {}
end
local part = math.floor((tonumber(time[1]) * 1000000 + tonumber(time[2])) / extra)
local known = redis.call('HMGET', key, 'o', 'n')
local oldest, newest = known[1] and tonumber(known[1]), known[2] and tonumber(known[2])
for at = 4, #ARGV, 2 do
  local then_, amount = part - tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  redis.call('HINCRBY', key, then_, amount)
  redis.call('HINCRBY', key, 's', amount)
  oldest = math.min(oldest or then_, then_)
  newest = math.max(newest or then_, then_)
end
redis.call('HSET', key, 'o', oldest, 'n', newest)
redis.call('PEXPIRE', key, math.ceil((PARTS + 2) * extra / 1000))
return {}
