-- KEYS: session.  ARGV: turn id.
local s, none = load(KEYS[1], ARGV[1])
if not s then return none end
if not s.turn_status then return {'unknown'} end
return {'turn', turn(s, ARGV[1])}
