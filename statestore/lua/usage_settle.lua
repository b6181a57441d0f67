-- Sets a tenant's ledger tokens right after they were counted: by the difference to what was told
-- when the count began, so that what was written meanwhile still counts.
-- KEYS: usage.  ARGV: tokens told before, tokens counted, key of this count.
local v = call('HMGET', KEYS[1], 'ledger', 'settled')
if v[2] == ARGV[3] then return {'done'} end
local ledger = tonumber(v[1] or '0') + tonumber(ARGV[2]) - tonumber(ARGV[1])
call('HSET', KEYS[1], 'ledger', int(math.max(0, ledger)), 'settled', ARGV[3])
return {'done'}
