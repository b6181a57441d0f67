-- Accepts a turn: its input goes into the ledger and it becomes the active turn.
-- KEYS: session, ledger.  ARGV: epoch, nonce, expected length, expected digest, turn id,
-- input digest, body, timeout ms, input tokens, output start length, output start digest,
-- token fingerprint, key of this call, most turns, most tokens.
local id = ARGV[5]
local s, none = load(KEYS[1], id)
if not s then return none end

if s.turn_status then
  local known = call('HMGET', KEYS[1], turn_field(id, 'input_digest'), turn_field(id, 'call'))
  if known[1] ~= ARGV[6] then return {'conflict', turn(s, id)} end
  if id == s.active and end_if_due(s) then
    save(s)
    s.turn_status = 'FAILED'
  end
  if ended(s.turn_status) then return {'exists', turn(s, id)} end
  local stale = fenced(s, ARGV[1], ARGV[2])
  if stale then return stale end
  -- The same call again, its answer was lost: it has begun the turn.
  return {known[2] == ARGV[13] and 'begun' or 'exists', turn(s, id)}
end

if s.state ~= 'OPEN' then return refused(s) end
local stale = fenced_writer(s, ARGV[1], ARGV[2])
if stale then return stale end
if tonumber(call('HGET', KEYS[1], 'x:' .. id) or '0') > s.now then
  return {'tombstoned'}
end
if s.active ~= '' then
  -- A turn found overdue ends here, but the caller rendered its input while that turn was running:
  -- it has to look again.
  local active = s.active
  if end_if_due(s) then save(s) end
  return {'busy', active}
end
if s.turn_index >= tonumber(ARGV[14]) then return {'limit', 'turns of the session'} end
if #ARGV[9] > 4 * tonumber(ARGV[15]) then return {'limit', 'tokens of one append'} end
if s.length ~= ARGV[3] or s.digest ~= ARGV[4] then return mismatch(s) end
local fingerprint = call('HGET', KEYS[1], 'fingerprint')
if fingerprint ~= '' and fingerprint ~= ARGV[12] then return refused(s) end

call('APPEND', KEYS[2], ARGV[9])
local t = 't:' .. id .. ':'
s.active, s.deadline = id, s.now + tonumber(ARGV[8])
put(s, 'active', id)
put(s, 'deadline', int(s.deadline))
put(s, 'fingerprint', ARGV[12])
put(s, 'ti:' .. int(s.turn_index), id)
put(s, t .. 'id', id)
put(s, t .. 'index', int(s.turn_index))
put(s, t .. 'input_digest', ARGV[6])
put(s, t .. 'body', ARGV[7])
put(s, t .. 'timeout', ARGV[8])
put(s, t .. 'deadline', int(s.deadline))
put(s, t .. 'status', 'RUNNING')
put(s, t .. 'attempt', '1')
put(s, t .. 'input_start', s.length)
put(s, t .. 'start_len', ARGV[10])
put(s, t .. 'start_digest', ARGV[11])
put(s, t .. 'replica', s.owner)
put(s, t .. 'replica_inc', s.owner_inc)
put(s, t .. 'call', ARGV[13])
put(s, t .. 'attempt_from', ARGV[10])
put(s, t .. 'stalled', '0')
put(s, t .. 'planned', '')
set_head(s, ARGV[10], ARGV[11])
save(s)
return {'begun', turn(s, id)}
