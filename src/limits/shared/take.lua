-- Takes an amount of each limit, or of none of them.
--
-- KEYS: our epoch, and a count each. ARGV: who we are, the epoch that this is of, until when an answer is waited for
-- (microseconds since 1970), then for each count what it is ("w" a window, "c" places at a time, "m" money), the amount,
-- the most there may be, and of a window the microseconds of a part of it, else how many seconds the count is kept.
--
-- Answers 1 and, for each count, how much is used, the milliseconds until nothing is, and the part that the amount counts
-- in, of money how much of it is spent; or 0 and, of the first count that does not allow it, which one it is, how much is
-- used, the milliseconds until nothing is, and those until it would allow it. Or 2: nobody waits for it any more.
local PARTS, STALE = 256, 30
local time = redis.call('TIME')
local seconds = tonumber(time[1])
local now = seconds * 1000000 + tonumber(time[2])
local me = ARGV[1]
local epoch = redis.call('GET', KEYS[1])
if now > tonumber(ARGV[3]) or epoch and tonumber(ARGV[2]) < tonumber(epoch) then return { 2 } end
local COUNTS = #KEYS - 1

local function number(value) return value and tonumber(value) or 0 end

-- Of a window: its sum, its oldest part and its newest, without what is out of it.
local function window(key, part, length)
  local first = part - PARTS
  local known = redis.call('HMGET', key, 's', 'o', 'n')
  local sum, oldest, newest = number(known[1]), known[2] and tonumber(known[2]) or part, number(known[3])
  if sum == 0 or newest < first then
    if known[1] then redis.call('DEL', key) end
    return 0, part, part
  end
  local known_oldest = oldest
  while oldest < first do
    local amount = redis.call('HGET', key, oldest)
    if amount then
      sum = sum - amount
      redis.call('HDEL', key, oldest)
    end
    oldest = oldest + 1
  end
  while oldest < newest and redis.call('HEXISTS', key, oldest) == 0 do oldest = oldest + 1 end
  -- Written down now: another limit may refuse, and nothing else is written then.
  if oldest > known_oldest then redis.call('HSET', key, 's', sum, 'o', oldest) end
  return sum, oldest, newest
end

-- What gateways hold that have been heard of lately.
local function held(key)
  local fields = redis.call('HGETALL', key)
  local amounts, heard = {}, {}
  for at = 1, #fields, 2 do
    local kind, name = string.sub(fields[at], 1, 2), string.sub(fields[at], 3)
    if kind == 'g:' then amounts[name] = tonumber(fields[at + 1]) end
    if kind == 't:' then heard[name] = tonumber(fields[at + 1]) end
  end
  local sum = 0
  for name, amount in pairs(amounts) do
    if seconds - (heard[name] or 0) > STALE then
      redis.call('HDEL', key, 'g:' .. name, 't:' .. name)
    else
      sum = sum + amount
    end
  end
  return sum
end

local plan = {}
for at = 1, COUNTS do
  local key, base = KEYS[at + 1], 4 + (at - 1) * 4
  local kind, amount = ARGV[base], tonumber(ARGV[base + 1])
  local max, extra = tonumber(ARGV[base + 2]), tonumber(ARGV[base + 3])
  if kind == 'w' then
    local part = math.floor(now / extra)
    local sum, oldest, newest = window(key, part, extra)
    if amount > 0 and sum + amount > max then
      local reset = sum > 0 and (newest + 1 + PARTS) * extra - now or 0
      local wait, freed = PARTS * extra, 0
      for known = oldest, newest do
        freed = freed + number(redis.call('HGET', key, known))
        if freed >= sum + amount - max then
          wait = (known + 1 + PARTS) * extra - now
          break
        end
      end
      return { 0, at, sum, math.ceil(reset / 1000), math.ceil(wait / 1000) }
    end
    plan[at] = { sum, oldest, math.max(part, newest) }
  elseif kind == 'c' then
    local sum = held(key)
    if amount > 0 and sum + amount > max then return { 0, at, sum, 0, 1000 } end
    plan[at] = { sum }
  else
    local spent = number(redis.call('HGET', key, 'spent'))
    local sum = spent + held(key)
    if amount > 0 and sum + amount > max then return { 0, at, sum, 0, 0 } end
    plan[at] = { sum, nil, spent }
  end
end

local answer = { 1 }
for at = 1, COUNTS do
  local key, base = KEYS[at + 1], 4 + (at - 1) * 4
  local kind, amount, extra = ARGV[base], tonumber(ARGV[base + 1]), tonumber(ARGV[base + 3])
  local sum, oldest, part = plan[at][1], plan[at][2], plan[at][3]
  local reset = 0
  if kind == 'w' then
    if amount > 0 then
      redis.call('HINCRBY', key, part, amount)
      redis.call('HSET', key, 's', sum + amount, 'o', oldest, 'n', part)
      redis.call('PEXPIRE', key, math.ceil((PARTS + 2) * extra / 1000))
    end
    reset = math.ceil(((part + 1 + PARTS) * extra - now) / 1000)
  else
    if amount > 0 then
      redis.call('HINCRBY', key, 'g:' .. me, amount)
      redis.call('HSET', key, 't:' .. me, seconds)
      redis.call('EXPIRE', key, extra)
    end
  end
  table.insert(answer, sum + amount)
  table.insert(answer, reset)
  table.insert(answer, part or 0)
end
return answer
