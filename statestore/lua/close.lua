-- Closes a session for good. The record stays until its retention ends; a second close can only
-- shorten that.
-- KEYS: session.  ARGV: retention ms, '1' if it was asked for (else the default).
local s, none = load(KEYS[1])
if not s then return none end
local purge_at = s.now + tonumber(ARGV[1])
if s.state == 'CLOSED' then
  if ARGV[2] == '1' and purge_at < tonumber(call('HGET', KEYS[1], 'purge_at')) then
    put(s, 'purge_at', int(purge_at))
    save(s)
  end
  return written(s)
end
if s.active ~= '' and not end_if_due(s) then
  end_turn(s, 'CANCELLED', 'cancelled', 'the session was closed')
end
put(s, 'state', 'CLOSED')
put(s, 'purge_at', int(purge_at))
set_owner(s, '', '0')
save(s)
return written(s)
