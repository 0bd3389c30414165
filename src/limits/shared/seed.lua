-- Tells what a gateway knows of counts and the server does not.
--
-- KEYS: the number of the last errand that was done for a gateway, its epoch, and a count each. ARGV: who we are, the
-- number of this errand, the epoch that begins, then for each count what is told ("parts" of a window, that money is spent "at least" or "more", what is
-- "held"); of a window the microseconds of a part, else how many seconds the count is kept; then how many amounts there
-- are, and of each how many parts ago it was and how much it is.
local PARTS, DONE_KEPT = 256, 86400
local me, number = ARGV[1], tonumber(ARGV[2])
if number <= tonumber(redis.call('GET', KEYS[1]) or 0) then return {} end
redis.call('SET', KEYS[1], ARGV[2], 'EX', DONE_KEPT)
-- What was sent before and comes later is not taken any more.
redis.call('SET', KEYS[2], ARGV[3], 'EX', DONE_KEPT)
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function parts(key, extra, first, last)
  local part = math.floor(now / extra)
  local known = redis.call('HMGET', key, 'o', 'n')
  local oldest, newest = known[1] and tonumber(known[1]), known[2] and tonumber(known[2])
  for at = first, last, 2 do
    local then_, amount = part - tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    redis.call('HINCRBY', key, then_, amount)
    redis.call('HINCRBY', key, 's', amount)
    oldest = math.min(oldest or then_, then_)
    newest = math.max(newest or then_, then_)
  end
  redis.call('HSET', key, 'o', oldest, 'n', newest)
  redis.call('PEXPIRE', key, math.ceil((PARTS + 2) * extra / 1000))
end

local base = 4
for at = 3, #KEYS do
  local key, how, extra, count = KEYS[at], ARGV[base], tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2])
  local first, amount = base + 3, ARGV[base + 4]
  base = first + 2 * count
  if how == 'parts' then
    parts(key, extra, first, base - 1)
  else
    if how == 'at least' then
      local known = tonumber(redis.call('HGET', key, 'spent') or 0)
      if known < tonumber(amount) then redis.call('HSET', key, 'spent', amount) end
    elseif how == 'more' then
      redis.call('HINCRBY', key, 'spent', amount)
    elseif amount == '0' then
      redis.call('HDEL', key, 'g:' .. me, 't:' .. me)
    else
      redis.call('HSET', key, 'g:' .. me, amount, 't:' .. me, time[1])
    end
    if redis.call('EXISTS', key) == 1 then redis.call('EXPIRE', key, extra) end
  end
end
return {}
