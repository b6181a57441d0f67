-- Makes a child whose ledger and turns are the parent's up to a turn boundary. Nothing is copied,
-- unless the child would inherit from too many sessions.
-- KEYS: parent, child, refs, child's ledger, then record and ledger of each of the parent's
-- ancestors and, last, of the parent.  ARGV: parent id, child id, turn index or '', labels, most
-- segments.
local s, none = load(KEYS[1])
if not s then return none end
local child, nothing = load(KEYS[2])
if child then
  if call('HGET', KEYS[2], 'parent') ~= ARGV[1] then return refused(child) end
  return written(child)
end
local no = taken(nothing, KEYS[2], KEYS[3], ARGV[2])
if no then return no end
if s.state == 'CLOSED' then return refused(s) end
-- Turns that have ended; an active turn is left out.
local turns = ARGV[3] == '' and s.turn_index or tonumber(ARGV[3])
if turns < 0 or turns > s.turn_index then return mismatch(s) end

local v = call('HMGET', KEYS[1], 'root', 'tenant', 'model', 'preamble', 'leading', 'fingerprint',
  'segments', 'prev', 'prev_inc')
local sources = parse_segments(v[7])
sources[#sources + 1] =
  {id = ARGV[1], first = s.own_base, first_turn = inherited_turns(sources), end_turn = s.turn_index}
-- Each source is cut off at the boundary, whose position its last inherited turn knows.
local length, digest = '0', v[1]
local inherited = {}
for i, source in ipairs(sources) do
  source.record, source.ledger = KEYS[3 + 2 * i], KEYS[4 + 2 * i]
  source.end_turn = math.min(source.end_turn, turns)
  if source.end_turn > source.first_turn then
    local last = call('HGET', source.record, 'ti:' .. int(source.end_turn - 1))
    local at = call('HMGET', source.record, turn_field(last, 'end_len'),
      turn_field(last, 'end_digest'))
    length, digest = at[1], at[2]
    source.last = tonumber(length)
    inherited[#inherited + 1] = source
  end
end

call('SET', KEYS[4], '')
call('HSET', KEYS[3], 'n:' .. ARGV[2], '1')
local own_base = length
if #inherited > tonumber(ARGV[5]) then
  for _, source in ipairs(inherited) do
    local bytes = 4 * (source.last - source.first)
    if bytes > 0 then
      call('APPEND', KEYS[4], call('GETRANGE', source.ledger, '0', int(bytes - 1)))
    end
    for index = source.first_turn, source.end_turn - 1 do
      local id = call('HGET', source.record, 'ti:' .. int(index))
      -- Filed under what is no UTF-8, so that it is no turn id of the child's clients.
      write_turn(KEYS[2], '\255' .. int(index), index, turn_values(source.record, id))
    end
  end
  inherited, own_base = {}, '0'
end
-- How far anyone refers to a session's ledger and turns: a repair must not go back before that, and
-- a purge keeps that much.
local function raise(field, value)
  if value > tonumber(call('HGET', KEYS[3], field) or '0') then
    call('HSET', KEYS[3], field, int(value))
  end
end
for _, source in ipairs(inherited) do
  call('HINCRBY', KEYS[3], 'n:' .. source.id, 1)
  raise('tokens:' .. source.id, source.last)
  raise('turns:' .. source.id, source.end_turn)
end

local prev, prev_inc = v[8], v[9] or '0'
if s.owner ~= '' then prev, prev_inc = s.owner, s.owner_inc end
call('HSET', KEYS[2],
  'schema', int(SCHEMA), 'min_reader', int(SCHEMA), 'id', ARGV[2], 'tenant', v[2], 'model', v[3],
  'state', 'OPEN', 'epoch', '0', 'nonce', '', 'owner', '', 'owner_inc', '0', 'length', length,
  'digest', digest, 'root', v[1], 'turn_index', int(turns), 'active', '', 'deadline', '0',
  'segments', format_segments(inherited), 'own_base', own_base, 'preamble', v[4],
  'leading', v[5], 'fingerprint', v[6], 'labels', ARGV[4], 'parent', ARGV[1], 'mig', '',
  'created', int(s.now), 'updated', int(s.now), 'prev', prev, 'prev_inc', prev_inc,
  'version', '1')
return session_reply('written', KEYS[2], s.now)
