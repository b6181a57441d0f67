-- The session, one of its turns, and a piece of its own ledger, as they stand together.
-- KEYS: session, and its ledger if tokens are wanted.  ARGV: turn id, first position, most tokens.
local s, none = load(KEYS[1], ARGV[1])
if not s then return none end
local reply = written(s)
reply[4] = s.turn_status and turn(s, ARGV[1])
if KEYS[2] then
  local first = math.max(tonumber(ARGV[2]), s.own_base)
  local at = 4 * (first - s.own_base)
  reply[5] = first
  reply[6] = call('GETRANGE', KEYS[2], int(at), int(at + 4 * tonumber(ARGV[3]) - 1))
end
return reply
