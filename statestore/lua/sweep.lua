-- Ends a turn past its deadline and says when the session is due next ('' for never).
-- KEYS: session.  Answers 'swept', ended turn or '', ms until due; or 'purge' and the session.
local s, none = load(KEYS[1])
if not s then return none end
local active = s.active
if s.state == 'CLOSED' then
  local left = tonumber(call('HGET', KEYS[1], 'purge_at')) - s.now
  if left <= 0 then return session_reply('purge', KEYS[1], s.now) end
  return {'swept', '', int(left)}
end
if end_if_due(s) then
  save(s)
  return {'swept', active, ''}
end
return {'swept', '', active == '' and '' or int(s.deadline - s.now)}
