-- Whether an index has a session already, or room for it.
-- KEYS: index.  ARGV: session id, most entries (0: any number).
local most = tonumber(ARGV[2])
if most == 0 or call('ZCARD', KEYS[1]) < most or call('ZSCORE', KEYS[1], ARGV[1]) then
  return {'done'}
end
return {'limit', 'sessions'}
