-- Tokens in a session's own ledger; none of a session that is gone.
-- KEYS: session.
local v = call('HMGET', KEYS[1], 'length', 'own_base')
if not v[1] then return {'size', '0'} end
return {'size', int(tonumber(v[1]) - tonumber(v[2]))}
