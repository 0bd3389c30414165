-- Says that a gateway is there, and counts them.
--
-- KEYS: the gateways, the mark of this server's memory, and counts of which this gateway holds something. ARGV: which
-- gateway it is, who holds it, and a mark for a memory that has none. Answers how many gateways there are, the
-- mark, and what time it is here, in microseconds since 1970.
local STALE, PLACES_KEPT = 30, 120
local time = redis.call('TIME')
local seconds = tonumber(time[1])
redis.call('ZADD', KEYS[1], seconds, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', seconds - STALE)
redis.call('EXPIRE', KEYS[1], 10 * STALE)
redis.call('SETNX', KEYS[2], ARGV[3])
for at = 3, #KEYS do
  if redis.call('HEXISTS', KEYS[at], 'g:' .. ARGV[2]) == 1 then
    redis.call('HSET', KEYS[at], 't:' .. ARGV[2], seconds)
    -- As long as an exchange goes on, its place is not forgotten.
    if redis.call('TTL', KEYS[at]) < PLACES_KEPT then redis.call('EXPIRE', KEYS[at], PLACES_KEPT) end
  end
end
return { redis.call('ZCARD', KEYS[1]), redis.call('GET', KEYS[2]), seconds * 1000000 + tonumber(time[2]) }
