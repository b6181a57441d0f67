-- Sessions that are due: id and score, in turn.
-- KEYS: due index.  ARGV: count.
local now = math.floor(now_us() / 1000)
return call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'WITHSCORES', 'LIMIT', '0', ARGV[1])
