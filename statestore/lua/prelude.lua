-- Shared by all scripts; SCHEMA, SESSION_FIELDS and TURN_FIELDS are written before it by scripts.py.
-- In scripts of one session KEYS[1] is the session's hash. A script answers with a list whose first
-- item names the outcome.

local call = redis.call
local unpack = unpack or table.unpack

-- Numbers are stored as decimal integers: tostring() would turn an epoch into 1.79e+15.
local function int(x)
  return string.format('%.0f', x)
end

local function now_us()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- The part of a session that decides; read with one HMGET, never with its large fields.
local CORE = {
  'min_reader', 'state', 'epoch', 'nonce', 'owner', 'owner_inc', 'length', 'digest',
  'turn_index', 'active', 'deadline', 'version', 'own_base',
}

-- The session, or nil and the answer that says why not. turn_id: also read that turn's status.
local function load(key, turn_id)
  local v = call('HMGET', key, 't:' .. (turn_id or '') .. ':status', unpack(CORE))
  if not v[3] then
    return nil, {'missing'}
  end
  if tonumber(v[2]) > SCHEMA then
    return nil, {'schema', v[2]}
  end
  -- Kept for its forks only; see purge.lua.
  if v[3] == 'PURGED' then
    return nil, {'missing'}
  end
  local us = now_us()
  return {
    key = key, changes = {}, us = us, now = math.floor(us / 1000), turn_status = v[1],
    state = v[3], epoch = v[4], nonce = v[5], owner = v[6], owner_inc = v[7],
    length = v[8], digest = v[9], turn_index = tonumber(v[10]), active = v[11],
    deadline = tonumber(v[12]), version = tonumber(v[13]), own_base = tonumber(v[14]),
  }
end

-- Writes are collected and saved with one HSET.
local function put(s, field, value)
  local n = #s.changes
  s.changes[n + 1] = field
  s.changes[n + 2] = value
end

local function save(s)
  s.version = s.version + 1
  put(s, 'version', int(s.version))
  put(s, 'updated', int(s.now))
  call('HSET', s.key, unpack(s.changes))
  s.changes = {}
end

local function set_head(s, length, digest)
  s.length, s.digest = length, digest
  put(s, 'length', length)
  put(s, 'digest', digest)
end

-- Turns are fields of the session's hash: t:<turn id>:<field>; ti:<index> names the turn there.
local function turn_field(turn_id, name)
  return 't:' .. turn_id .. ':' .. name
end

local function turn_values(key, turn_id)
  local names = {}
  for i, name in ipairs(TURN_FIELDS) do
    names[i] = turn_field(turn_id, name)
  end
  return call('HMGET', key, unpack(names))
end

-- Writes a turn as it is, under an id of its own in this record.
local function write_turn(key, id, index, values)
  local fields = {'ti:' .. int(index), id}
  for i, name in ipairs(TURN_FIELDS) do
    if values[i] then
      fields[#fields + 1] = turn_field(id, name)
      fields[#fields + 1] = values[i]
    end
  end
  call('HSET', key, unpack(fields))
end

-- All fields of a turn that exists. An active turn's output ends where its ledger does.
local function turn(s, turn_id)
  local v = turn_values(s.key, turn_id)
  if turn_id == s.active then
    for i, name in ipairs(TURN_FIELDS) do
      if name == 'end_len' then v[i] = s.length end
      if name == 'end_digest' then v[i] = s.digest end
    end
  end
  return v
end

local function ended(status)
  return status == 'COMMITTED' or status == 'CANCELLED' or status == 'FAILED'
end

-- Invariant: at most one turn is active, and only an active turn is RUNNING or INTERRUPTED.
local function end_turn(s, status, reason, err)
  local id = s.active
  put(s, turn_field(id, 'status'), status)
  put(s, turn_field(id, 'reason'), reason)
  put(s, turn_field(id, 'error'), err)
  put(s, turn_field(id, 'end_len'), s.length)
  put(s, turn_field(id, 'end_digest'), s.digest)
  s.active, s.deadline = '', 0
  s.turn_index = s.turn_index + 1
  put(s, 'active', '')
  put(s, 'deadline', '0')
  put(s, 'turn_index', int(s.turn_index))
  put(s, 'turn_ended', int(s.now))
end

-- Whichever script touches a turn first after its deadline ends it. True if it did.
local function end_if_due(s)
  if s.active == '' or s.now < s.deadline then
    return false
  end
  end_turn(s, 'FAILED', 'deadline', 'the deadline of the turn passed')
  return true
end

local function set_owner(s, owner, owner_inc)
  if s.owner ~= '' and (s.owner ~= owner or s.owner_inc ~= owner_inc) then
    put(s, 'prev', s.owner)
    put(s, 'prev_inc', s.owner_inc)
  end
  s.owner, s.owner_inc = owner, owner_inc
  put(s, 'owner', owner)
  put(s, 'owner_inc', owner_inc)
  put(s, 'mig', '')
end

-- Invariant: epochs only grow, and past the clock: a number that the server granted and then lost
-- in a fail-over is not granted again.
local function grant(s, owner, owner_inc, nonce)
  s.epoch = int(math.max(tonumber(s.epoch) + 1, s.us))
  s.nonce = nonce
  put(s, 'epoch', s.epoch)
  put(s, 'nonce', nonce)
  set_owner(s, owner, owner_inc)
end

local function session_reply(outcome, key, now)
  return {outcome, int(now), call('HMGET', key, unpack(SESSION_FIELDS))}
end

local function written(s)
  return session_reply('written', s.key, s.now)
end

local function lost(s)
  return session_reply('lost', s.key, s.now)
end

local function refused(s)
  return {'refused', s.state, s.active}
end

-- What to answer to whoever would make a session that load() did not find; nil if it may. One that
-- was purged is not made anew while forks refer to it, nor by a late repeat; see purge.lua.
local function taken(none, key, refs, id)
  if none[1] ~= 'missing' then return none end
  if call('EXISTS', key) == 1 or call('HGET', refs, 'gone:' .. id) then
    return {'refused', 'CLOSED', ''}
  end
end

local function mismatch(s)
  return {'mismatch', s.length, s.digest, s.epoch, s.nonce}
end

-- nil if (epoch, nonce) is the owner's; else the answer that fences the caller.
local function fenced(s, epoch, nonce)
  if s.owner ~= '' and s.epoch == epoch and s.nonce == nonce then
    return nil
  end
  local twin = s.epoch == epoch and s.nonce ~= nonce
  return {'fenced', s.epoch, s.nonce, s.owner, s.owner_inc, twin and 1 or 0}
end

-- The same for writers of the ledger. A caller whose epoch is newer than the stored one proves that
-- the server lost writes: it is told what is stored, so that it can repair.
local function fenced_writer(s, epoch, nonce)
  if tonumber(epoch) > tonumber(s.epoch) then
    return mismatch(s)
  end
  return fenced(s, epoch, nonce)
end

-- Cuts a ledger off, or leaves it as it is if it has no more.
local function truncate(ledger, tokens)
  if call('STRLEN', ledger) > 4 * tokens then
    call('SET', ledger, tokens > 0 and call('GETRANGE', ledger, '0', int(4 * tokens - 1)) or '')
  end
end

-- Inherited segments, 'session:start:end:first turn:end turn' joined by commas: whose tokens and
-- turns these are. A segment starts where that session's own ledger and turns do, so position p of
-- it is at byte 4 * (p - start) of that ledger.
local function parse_segments(text)
  local list = {}
  for id, first, last, first_turn, end_turn in
      string.gmatch(text, '([^:,]+):(%d+):(%d+):(%d+):(%d+)') do
    list[#list + 1] = {
      id = id, first = tonumber(first), last = tonumber(last),
      first_turn = tonumber(first_turn), end_turn = tonumber(end_turn),
    }
  end
  return list
end

-- The index of a session's own first turn.
local function inherited_turns(segments)
  return #segments > 0 and segments[#segments].end_turn or 0
end

local function format_segments(list)
  local parts = {}
  for i, segment in ipairs(list) do
    parts[i] = table.concat({
      segment.id, int(segment.first), int(segment.last),
      int(segment.first_turn), int(segment.end_turn),
    }, ':')
  end
  return table.concat(parts, ',')
end
