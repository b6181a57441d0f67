-- One page of an index, newest first: id and score, in turn.
-- KEYS: index.  ARGV: highest score, or '(' and the last one seen, count.
return call('ZREVRANGEBYSCORE', KEYS[1], ARGV[1], '-inf', 'WITHSCORES', 'LIMIT', '0', ARGV[2])
