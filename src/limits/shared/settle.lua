-- Gives back what was not taken, and counts what was taken beyond.
--
-- KEYS: the number of the last errand that was done for a gateway, and a count each. ARGV: who we are, the number of this
-- errand, then for each count what it is, what is given back, what is added, of a window the part that it was counted in,
-- or as a negative number how many microseconds ago (else 0), of a window the microseconds of a part, else how many
-- seconds the count is kept, and what is held from now on. Answers how much is spent of each, where more is added.
local PARTS, DONE_KEPT = 256, 86400
local me, number = ARGV[1], tonumber(ARGV[2])
if number <= tonumber(redis.call('GET', KEYS[1]) or 0) then return {} end
redis.call('SET', KEYS[1], ARGV[2], 'EX', DONE_KEPT)
local spent = {}
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

-- Takes something out of a part of a window; the rest that was not there.
local function take_out(key, part, back)
  local known = back > 0 and redis.call('HGET', key, part)
  if not known then return back end
  local given = math.min(back, tonumber(known))
  if redis.call('HINCRBY', key, part, -given) <= 0 then redis.call('HDEL', key, part) end
  redis.call('HINCRBY', key, 's', -given)
  return back - given
end

for at = 2, #KEYS do
  local key, base = KEYS[at], 3 + (at - 2) * 6
  local kind, back, more = ARGV[base], tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2])
  spent[at - 1] = 0
  local part, extra, hold = tonumber(ARGV[base + 3]), tonumber(ARGV[base + 4]), tonumber(ARGV[base + 5])
  if kind == 'w' then
    if part >= 0 then
      take_out(key, part, back)
    else
      -- It was told since, by a clock whose parts begin at other times.
      part = math.floor((now + part) / extra)
      take_out(key, part + 1, take_out(key, part - 1, take_out(key, part, back)))
    end
    if more > 0 then
      local current = math.max(math.floor(now / extra), tonumber(redis.call('HGET', key, 'n') or 0))
      redis.call('HINCRBY', key, current, more)
      redis.call('HINCRBY', key, 's', more)
      redis.call('HSET', key, 'n', current)
      redis.call('HSETNX', key, 'o', current)
      redis.call('PEXPIRE', key, math.ceil((PARTS + 2) * extra / 1000))
    end
  else
    local mine = 'g:' .. me
    if back > 0 and redis.call('HEXISTS', key, mine) == 1 then
      if redis.call('HINCRBY', key, mine, -back) <= 0 then redis.call('HDEL', key, mine, 't:' .. me) end
    end
    if hold > 0 then
      redis.call('HINCRBY', key, mine, hold)
      redis.call('HSET', key, 't:' .. me, time[1])
      redis.call('EXPIRE', key, extra)
    end
    if more > 0 then
      spent[at - 1] = redis.call('HINCRBY', key, 'spent', more)
      redis.call('EXPIRE', key, extra)
    end
  end
end
return spent
