-- Gives back what was not taken, and counts what was taken beyond.
--
-- KEYS: a mark that it was done, and a count each. ARGV: who we are, then for each count what it is, what is given
-- back, what is added, of a window the part that it was counted in (else 0), and of a window the microseconds of a
-- part, else how many seconds the count is kept. Answers how much is spent of each, where more is added.
local PARTS, DONE_KEPT = 256, 600
if not redis.call('SET', KEYS[1], 1, 'NX', 'EX', DONE_KEPT) then return {} end
local spent = {}
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local me = ARGV[1]

for at = 2, #KEYS do
  local key, base = KEYS[at], 2 + (at - 2) * 5
  local kind, back, more = ARGV[base], tonumber(ARGV[base + 1]), tonumber(ARGV[base + 2])
  spent[at - 1] = 0
  local part, extra = tonumber(ARGV[base + 3]), tonumber(ARGV[base + 4])
  if kind == 'w' then
    local known = redis.call('HGET', key, part)
    if back > 0 and known then
      local given = math.min(back, tonumber(known))
      if redis.call('HINCRBY', key, part, -given) <= 0 then redis.call('HDEL', key, part) end
      redis.call('HINCRBY', key, 's', -given)
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
    if more > 0 then
      spent[at - 1] = redis.call('HINCRBY', key, 'spent', more)
      redis.call('EXPIRE', key, extra)
    end
  end
end
return spent
