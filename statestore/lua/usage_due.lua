-- The tenant whose ledger tokens have gone uncounted for longest, if that is long enough; its count
-- begins now.
-- KEYS: tenants by when their last count began.  ARGV: least age in microseconds.
local now = now_us()
local found = call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now - tonumber(ARGV[1])), 'WITHSCORES',
  'LIMIT', '0', '1')
if not found[1] then return {'none'} end
call('ZADD', KEYS[1], int(now), found[1])
return {'due', found[1]}
