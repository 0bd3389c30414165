-- Brings what a gateway knows to a server that does not, or not yet.
--
-- KEYS: one count. ARGV: what it is ("w" a window, "c" places at a time, "m" money), whether to add to what is known
-- ("add") or to be known where nothing is ("set"), who we are, of a window the microseconds of a part, else how many
-- seconds the count is kept; then how many parts ago and an amount, of a window for each of its parts.
local PARTS = 256
local key, kind, how, me, extra = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local time = redis.call('TIME')
if kind == 'm' then
  if how == 'add' then
    redis.call('HINCRBY', key, 'spent', ARGV[6])
  else
    redis.call('HSETNX', key, 'spent', ARGV[6])
  end
  redis.call('EXPIRE', key, extra)
  return 1
end
if kind == 'c' then
  redis.call('HSET', key, 'g:' .. me, ARGV[6], 't:' .. me, time[1])
  redis.call('EXPIRE', key, extra)
  return 1
end
local part = math.floor((tonumber(time[1]) * 1000000 + tonumber(time[2])) / extra)
local known = redis.call('HMGET', key, 'o', 'n')
local oldest, newest = known[1] and tonumber(known[1]), known[2] and tonumber(known[2])
for at = 5, #ARGV, 2 do
  local then_, amount = part - tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  redis.call('HINCRBY', key, then_, amount)
  redis.call('HINCRBY', key, 's', amount)
  oldest = math.min(oldest or then_, then_)
  newest = math.max(newest or then_, then_)
end
redis.call('HSET', key, 'o', oldest, 'n', newest)
redis.call('PEXPIRE', key, math.ceil((PARTS + 2) * extra / 1000))
return 1
