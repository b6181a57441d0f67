-- The owner goes on with the active turn in a new attempt.
-- KEYS: session.  ARGV: epoch, nonce, turn id, key of this call, most attempts without progress.
local id = ARGV[3]
local s, none = load(KEYS[1], id)
if not s then return none end
if not s.turn_status then return fenced(s, ARGV[1], ARGV[2]) or {'unknown'} end
if ended(s.turn_status) then return {'ended', turn(s, id)} end
if end_if_due(s) then
  save(s)
  return {'ended', turn(s, id)}
end
local stale = fenced(s, ARGV[1], ARGV[2])
if stale then return stale end

local function resumed()
  local reply = session_reply('resumed', s.key, s.now)
  reply[4] = turn(s, id)
  return reply
end

local t = 't:' .. id .. ':'
local v = call('HMGET', KEYS[1], t .. 'call', t .. 'attempt', t .. 'attempt_from', t .. 'stalled',
  t .. 'planned')
if v[1] == ARGV[4] then return resumed() end

local stalled = tonumber(v[4])
if tonumber(s.length) > tonumber(v[3]) then
  stalled = 0
elseif v[5] == '' and s.turn_status == 'INTERRUPTED' then
  -- Neither a planned hand-over nor an owner that starts its own run again counts.
  stalled = stalled + 1
end
if stalled >= tonumber(ARGV[5]) then
  end_turn(s, 'FAILED', 'error', int(stalled) .. ' attempts in a row added no token')
  save(s)
  return {'ended', turn(s, id)}
end
put(s, t .. 'status', 'RUNNING')
put(s, t .. 'attempt', int(tonumber(v[2]) + 1))
put(s, t .. 'attempt_from', s.length)
put(s, t .. 'stalled', int(stalled))
put(s, t .. 'planned', '')
put(s, t .. 'replica', s.owner)
put(s, t .. 'replica_inc', s.owner_inc)
put(s, t .. 'call', ARGV[4])
save(s)
return resumed()
