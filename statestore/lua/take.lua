-- Takes a session from its owner, for another or for nobody ('').
-- KEYS: session.  ARGV: expected epoch, expected nonce, owner, incarnation, new nonce.
local s, none = load(KEYS[1])
if not s then return none end
if s.nonce == ARGV[5] and s.owner == ARGV[3] and s.owner_inc == ARGV[4] then
  return written(s)
end
if s.state ~= 'OPEN' then return refused(s) end
if s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then return lost(s) end
if not end_if_due(s) and s.active ~= '' then
  put(s, turn_field(s.active, 'status'), 'INTERRUPTED')
end
grant(s, ARGV[3], ARGV[4], ARGV[5])
save(s)
return written(s)
