-- The owner writes back what the server lost in a restart or a fail-over.
-- KEYS: session, ledger, refs.  ARGV: epoch, nonce, owner, incarnation, observed epoch,
-- observed nonce, observed length, observed digest, tokens to keep, tokens, head length,
-- head digest, active turn or '', turn index, session id, then each turn as its TURN_FIELDS.
local FIRST = 16
local s, none = load(KEYS[1])
if not s then return none end
if s.state ~= 'OPEN' then return refused(s) end
local number, stored = tonumber(ARGV[1]), tonumber(s.epoch)
if number < stored or (number == stored and ARGV[2] ~= s.nonce) then
  return fenced(s, ARGV[1], ARGV[2])
end

local given = {}
for at = FIRST, #ARGV, #TURN_FIELDS do
  local t = {values = {}}
  for i, name in ipairs(TURN_FIELDS) do
    t.values[i] = ARGV[at + i - 1]
    t[name] = t.values[i]
  end
  given[#given + 1] = t
end

if number == stored and s.length == ARGV[11] and s.digest == ARGV[12]
    and s.active == ARGV[13] and s.turn_index == tonumber(ARGV[14]) then
  return {'appended'}
end
if s.epoch ~= ARGV[5] or s.nonce ~= ARGV[6] or s.length ~= ARGV[7] or s.digest ~= ARGV[8] then
  return mismatch(s)
end

-- Turns that ended stay as they ended: a given turn that says otherwise ends the repair.
for _, t in ipairs(given) do
  local v = call('HMGET', KEYS[1], turn_field(t.id, 'status'), turn_field(t.id, 'end_len'),
    turn_field(t.id, 'end_digest'))
  t.stored = v[1]
  if v[1] and ended(v[1]) and (t.status ~= v[1] or t.end_len ~= v[2] or t.end_digest ~= v[3]) then
    return {'ended', turn(s, t.id)}
  end
end

-- Neither the tokens of an ancestor nor tokens and turns that a fork refers to can be replaced.
local keep, length = tonumber(ARGV[9]), tonumber(s.length)
local diverged = {'fenced', s.epoch, s.nonce, s.owner, s.owner_inc, 1}
local far = call('HMGET', KEYS[3], 'tokens:' .. ARGV[15], 'turns:' .. ARGV[15])
local forked_tokens, forked_turns = tonumber(far[1] or '0'), tonumber(far[2] or '0')
local past = tonumber(ARGV[14]) + (ARGV[13] ~= '' and 1 or 0)
if keep < s.own_base or keep > length or past < forked_turns
    or (keep < length and keep < forked_tokens) then
  return diverged
end
for _, t in ipairs(given) do
  local id = call('HGET', KEYS[1], 'ti:' .. t.index)
  t.replaces = id and id ~= t.id
  if t.replaces and tonumber(t.index) < forked_turns then return diverged end
end
truncate(KEYS[2], keep - s.own_base)
call('APPEND', KEYS[2], ARGV[10])

-- Turns of a history that is given up: another turn at a given index, or past the last index.
local function forget(index)
  local id = call('HGET', KEYS[1], 'ti:' .. int(index))
  if not id then return false end
  local names = {'ti:' .. int(index)}
  for _, name in ipairs(TURN_FIELDS) do names[#names + 1] = turn_field(id, name) end
  for _, name in ipairs({'call', 'attempt_from', 'stalled', 'planned'}) do
    names[#names + 1] = turn_field(id, name)
  end
  call('HDEL', KEYS[1], unpack(names))
  return true
end
for _, t in ipairs(given) do
  if t.replaces then forget(tonumber(t.index)) end
end
while forget(past) do past = past + 1 end

local deadline = '0'
for _, t in ipairs(given) do
  if not (t.stored and ended(t.stored)) then
    write_turn(KEYS[1], t.id, t.index, t.values)
    call('HSET', KEYS[1], turn_field(t.id, 'call'), '', turn_field(t.id, 'attempt_from'),
      t.start_len, turn_field(t.id, 'stalled'), '0', turn_field(t.id, 'planned'), '')
  end
end
if ARGV[13] ~= '' then
  deadline = call('HGET', KEYS[1], turn_field(ARGV[13], 'deadline'))
  put(s, turn_field(ARGV[13], 'status'), 'RUNNING')
end
s.epoch, s.nonce = ARGV[1], ARGV[2]
put(s, 'epoch', ARGV[1])
put(s, 'nonce', ARGV[2])
set_owner(s, ARGV[3], ARGV[4])
set_head(s, ARGV[11], ARGV[12])
put(s, 'active', ARGV[13])
put(s, 'deadline', deadline)
put(s, 'turn_index', ARGV[14])
save(s)
return {'appended'}
