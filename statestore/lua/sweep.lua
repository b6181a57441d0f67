-- Ends a turn past its deadline, forgets a purge, and says when the session is due next ('' for
-- never).
-- KEYS: session, refs.  ARGV: session id.
-- Answers 'swept', ended turn or '', ms until due; or 'purge' and the session.
local s, none = load(KEYS[1])
if not s then
  local gone = 'gone:' .. ARGV[1]
  local at = none[1] == 'missing' and call('HGET', KEYS[2], gone)
  if not at then return none end
  local left = tonumber(at) - math.floor(now_us() / 1000)
  if left > 0 then return {'swept', '', int(left)} end
  call('HDEL', KEYS[2], gone)
  return none
end
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
