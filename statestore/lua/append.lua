-- Journals one step of a turn, and ends the turn with it if a result is given. The hot path: one
-- HMGET, one APPEND, one HSET.
-- KEYS: session, ledger.  ARGV: epoch, nonce, turn id, expected length, expected digest,
-- head length, head digest, tokens, status or '', reason, text end, usage, error.
local id, commit = ARGV[3], ARGV[9] ~= ''
local s, none = load(KEYS[1], id)
if not s then return none end
-- Compared without the owner: a turn cancelled by a close must be reported as ended.
if s.epoch ~= ARGV[1] or s.nonce ~= ARGV[2] then
  return fenced_writer(s, ARGV[1], ARGV[2])
end
if not s.turn_status then
  -- The begin is gone. If the head shows it too, the server lost writes and the owner can repair.
  if s.length ~= ARGV[4] or s.digest ~= ARGV[5] then return mismatch(s) end
  return {'unknown'}
end
if ended(s.turn_status) then
  local v = call('HMGET', KEYS[1], turn_field(id, 'end_len'), turn_field(id, 'end_digest'))
  if commit and s.turn_status == ARGV[9] and v[1] == ARGV[6] and v[2] == ARGV[7] then
    return {'appended'}
  end
  return {'ended', turn(s, id)}
end
if end_if_due(s) then
  save(s)
  return {'ended', turn(s, id)}
end
if s.length == ARGV[4] and s.digest == ARGV[5] then
  call('APPEND', KEYS[2], ARGV[8])
  set_head(s, ARGV[6], ARGV[7])
elseif s.length ~= ARGV[6] or s.digest ~= ARGV[7] then
  return mismatch(s)
elseif not commit then
  return {'appended'}
end
if s.turn_status ~= 'RUNNING' then
  -- A resume by this very epoch was lost by the server; its owner goes on.
  put(s, turn_field(id, 'status'), 'RUNNING')
end
if commit then
  put(s, turn_field(id, 'text_end'), ARGV[11])
  put(s, turn_field(id, 'usage'), ARGV[12])
  end_turn(s, ARGV[9], ARGV[10], ARGV[13])
end
save(s)
return {'appended'}
