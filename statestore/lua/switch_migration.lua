-- Ownership passes to the target that has verified what it holds.
-- KEYS: session.  ARGV: epoch, nonce, migration id, verified length, verified digest,
-- active turn or '', new nonce.
local s, none = load(KEYS[1])
if not s then return none end
if s.nonce == ARGV[7] and s.owner ~= '' then return written(s) end
if s.state ~= 'OPEN' then return refused(s) end
if s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then return lost(s) end
if end_if_due(s) then save(s) end
local v = call('HMGET', KEYS[1], 'mig', 'mig_target', 'mig_inc', 'mig_until')
if v[1] ~= ARGV[3] or tonumber(v[4]) <= s.now or s.active ~= ARGV[6] then return refused(s) end
if s.length ~= ARGV[4] or s.digest ~= ARGV[5] then return mismatch(s) end
if s.active ~= '' then
  put(s, turn_field(s.active, 'status'), 'INTERRUPTED')
  put(s, turn_field(s.active, 'planned'), '1')
end
grant(s, v[2], v[3], ARGV[7])
save(s)
return written(s)
