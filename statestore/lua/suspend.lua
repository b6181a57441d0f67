-- Moves an idle session between OPEN and SUSPENDED. A suspended session has no owner; its epoch
-- stays, so that the next placement is ordered after it.
-- KEYS: session.  ARGV: the state to have.
local s, none = load(KEYS[1])
if not s then return none end
if s.state == ARGV[1] then return written(s) end
if s.state == 'CLOSED' then return refused(s) end
if end_if_due(s) then save(s) end
if s.active ~= '' then return refused(s) end
put(s, 'state', ARGV[1])
set_owner(s, '', '0')
save(s)
return written(s)
