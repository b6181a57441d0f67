-- The owner writes back what the server lost in a restart or a fail-over.
-- KEYS: session, ledger, refs.  ARGV: epoch, nonce, owner, incarnation, observed epoch,
-- observed nonce, observed length, observed digest, tokens to keep, tokens, head length,
-- head digest, active turn or '', turn index, session id, token fingerprint, then each turn as its
-- TURN_FIELDS.
local FIRST = 17
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
local ending = call('HMGET', KEYS[1], turn_field(ARGV[13], 'status'),
  turn_field(ARGV[13], 'end_len'), turn_field(ARGV[13], 'end_digest'))
if ending[1] and ended(ending[1]) and ending[2] == ARGV[11] and ending[3] == ARGV[12] then
  return {'ended', turn(s, ARGV[13])}
end
if s.epoch ~= ARGV[5] or s.nonce ~= ARGV[6] or s.length ~= ARGV[7] or s.digest ~= ARGV[8] then
  return mismatch(s)
end

local keep, length = tonumber(ARGV[9]), tonumber(s.length)
local far = call('HMGET', KEYS[3], 'tokens:' .. ARGV[15], 'turns:' .. ARGV[15])
local forked_tokens, forked_turns = tonumber(far[1] or '0'), tonumber(far[2] or '0')

-- Whether the server ended a turn (a cancel, its deadline) after it had lost the end of its output,
-- and nothing was built on that end since: no turn, and no fork.
local function cut_short(t, stored)
  return (stored.reason == 'cancelled' or stored.reason == 'deadline') and (stored.usage or '') == ''
    and t.index == stored.index and t.start_len == stored.start_len
    and tonumber(t.index) == s.turn_index - 1 and s.active == ''
    and tonumber(t.index) >= forked_turns
    and keep == length and tonumber(t.end_len) > length
end

-- Turns that ended stay as they ended: a given turn that says otherwise ends the repair. Only one
-- that was cut short gets its tokens back, and ends where they do; as it had ended at its owner, if
-- it had, for its client has heard so.
local longer
for _, t in ipairs(given) do
  local stored, values = {}, turn_values(KEYS[1], t.id)
  for i, name in ipairs(TURN_FIELDS) do stored[name] = values[i] end
  t.has_ended = stored.status and ended(stored.status)
  if t.has_ended and (t.status ~= stored.status or t.end_len ~= stored.end_len
      or t.end_digest ~= stored.end_digest) then
    if not cut_short(t, stored) then return {'ended', turn(s, t.id)} end
    longer, t.has_ended = t, not ended(t.status)
  end
end

-- Neither the tokens of an ancestor nor tokens and turns that a fork refers to can be replaced.
local diverged = {'fenced', s.epoch, s.nonce, s.owner, s.owner_inc, 1}
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
  if not t.has_ended then
    write_turn(KEYS[1], t.id, t.index, t.values)
    call('HSET', KEYS[1], turn_field(t.id, 'call'), '', turn_field(t.id, 'attempt_from'),
      t.start_len, turn_field(t.id, 'stalled'), '0', turn_field(t.id, 'planned'), '')
  end
end
local active, turn_index = ARGV[13], ARGV[14]
if longer then
  put(s, turn_field(longer.id, 'end_len'), longer.end_len)
  put(s, turn_field(longer.id, 'end_digest'), longer.end_digest)
end
local tombstone = active ~= '' and call('HGET', KEYS[1], 'x:' .. active)
if longer and longer.id == active then
  active, turn_index = '', int(s.turn_index)
elseif active ~= '' then
  deadline = call('HGET', KEYS[1], turn_field(active, 'deadline'))
  put(s, turn_field(active, 'status'), 'RUNNING')
end
s.epoch, s.nonce = ARGV[1], ARGV[2]
put(s, 'epoch', ARGV[1])
put(s, 'nonce', ARGV[2])
set_owner(s, ARGV[3], ARGV[4])
set_head(s, ARGV[11], ARGV[12])
put(s, 'active', active)
put(s, 'deadline', deadline)
put(s, 'turn_index', turn_index)
put(s, 'fingerprint', ARGV[16])
s.active, s.turn_index = active, tonumber(turn_index)
if active ~= '' and tonumber(tombstone or '0') > s.now then
  -- A cancel that came while the server had lost the very begin of the turn.
  end_turn(s, 'CANCELLED', 'cancelled', '')
end
save(s)
if s.active ~= ARGV[13] then return {'ended', turn(s, ARGV[13])} end
return {'appended'}
