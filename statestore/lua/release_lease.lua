-- KEYS: lease.  ARGV: holder, token.
local v = call('HMGET', KEYS[1], 'holder', 'token')
if v[1] == ARGV[1] and v[2] == ARGV[2] then call('HSET', KEYS[1], 'until', '0') end
return {'done'}
