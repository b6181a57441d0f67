-- The tenant's salt, made at first use.
-- KEYS: salt.  ARGV: random bytes.
local salt = call('GET', KEYS[1])
if salt then return salt end
call('SET', KEYS[1], ARGV[1])
return ARGV[1]
