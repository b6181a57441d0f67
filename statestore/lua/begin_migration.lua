-- Writes the leased record of a move that is under way.
-- KEYS: session.  ARGV: epoch, nonce, migration id, target, incarnation, lease ms.
local s, none = load(KEYS[1])
if not s then return none end
if s.state ~= 'OPEN' then return refused(s) end
if s.owner == '' or s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then return lost(s) end
local v = call('HMGET', KEYS[1], 'mig', 'mig_until')
if v[1] ~= '' and v[1] ~= ARGV[3] and tonumber(v[2]) > s.now then return refused(s) end
put(s, 'mig', ARGV[3])
put(s, 'mig_target', ARGV[4])
put(s, 'mig_inc', ARGV[5])
put(s, 'mig_until', int(s.now + tonumber(ARGV[6])))
save(s)
return written(s)
