-- Has a tenant's ledger tokens counted again, as if the last count had been that long ago, or longer.
-- KEYS: tenants by when their last count began.  ARGV: tenant, age in microseconds.
local began = now_us() - tonumber(ARGV[2])
local known = call('ZSCORE', KEYS[1], ARGV[1])
if not known or (tonumber(ARGV[2]) > 0 and tonumber(known) > began) then
  call('ZADD', KEYS[1], int(began), ARGV[1])
end
return {'done'}
