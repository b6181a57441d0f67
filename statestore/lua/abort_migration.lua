-- Clears the record of a move; the owner is as it was.
-- KEYS: session.  ARGV: migration id.
local s, none = load(KEYS[1])
if not s then return none end
if call('HGET', KEYS[1], 'mig') == ARGV[1] then
  put(s, 'mig', '')
  save(s)
end
return {'done'}
