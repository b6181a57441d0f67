-- Makes a child whose ledger is the parent's up to a turn boundary. Tokens are not copied, unless
-- the child would inherit from too many ledgers; the records of the inherited turns are.
-- KEYS: parent, child, refs, child's ledger, then the ledgers of the parent's segments, the
-- parent's own last.  ARGV: parent id, child id, turn index or '', labels, most segments.
local s, none = load(KEYS[1])
if not s then return none end
if call('EXISTS', KEYS[2]) == 1 then
  local child, unreadable = load(KEYS[2])
  if not child then return unreadable end
  if call('HGET', KEYS[2], 'parent') ~= ARGV[1] then return refused(child) end
  return written(child)
end
if s.state == 'CLOSED' then return refused(s) end
-- Turns that have ended; an active turn is left out.
local turns = ARGV[3] == '' and s.turn_index or tonumber(ARGV[3])
if turns < 0 or turns > s.turn_index then return mismatch(s) end

local v = call('HMGET', KEYS[1], 'root', 'tenant', 'model', 'preamble', 'leading', 'fingerprint',
  'segments', 'prev', 'prev_inc')
local length, digest = '0', v[1]
if turns > 0 then
  local last = call('HGET', KEYS[1], 'ti:' .. int(turns - 1))
  local at = call('HMGET', KEYS[1], turn_field(last, 'end_len'), turn_field(last, 'end_digest'))
  length, digest = at[1], at[2]
end
local position = tonumber(length)

-- What the child inherits: the parent's segments and its own ledger, cut off at the boundary.
local sources = parse_segments(v[7])
sources[#sources + 1] = {id = ARGV[1], first = s.own_base, last = tonumber(s.length)}
local inherited = {}
for i, segment in ipairs(sources) do
  local last = math.min(segment.last, position)
  if last > segment.first then
    inherited[#inherited + 1] =
      {id = segment.id, first = segment.first, last = last, key = KEYS[4 + i]}
  end
end

call('SET', KEYS[4], '')
call('HSET', KEYS[3], 'n:' .. ARGV[2], '1')
local own_base = position
if #inherited > tonumber(ARGV[5]) then
  for _, segment in ipairs(inherited) do
    local bytes = 4 * (segment.last - segment.first)
    call('APPEND', KEYS[4], call('GETRANGE', segment.key, '0', int(bytes - 1)))
  end
  inherited, own_base = {}, 0
end
for _, segment in ipairs(inherited) do
  call('HINCRBY', KEYS[3], 'n:' .. segment.id, 1)
  -- How far anyone refers to that ledger: a repair must not truncate it below this.
  local furthest = tonumber(call('HGET', KEYS[3], 'e:' .. segment.id) or '0')
  if segment.last > furthest then
    call('HSET', KEYS[3], 'e:' .. segment.id, int(segment.last))
  end
end

local prev, prev_inc = v[8], v[9] or '0'
if s.owner ~= '' then prev, prev_inc = s.owner, s.owner_inc end
call('HSET', KEYS[2],
  'schema', int(SCHEMA), 'min_reader', int(SCHEMA), 'id', ARGV[2], 'tenant', v[2], 'model', v[3],
  'state', 'OPEN', 'epoch', '0', 'nonce', '', 'owner', '', 'owner_inc', '0', 'length', length,
  'digest', digest, 'root', v[1], 'turn_index', int(turns), 'active', '', 'deadline', '0',
  'segments', format_segments(inherited), 'own_base', int(own_base), 'preamble', v[4],
  'leading', v[5], 'fingerprint', v[6], 'labels', ARGV[4], 'parent', ARGV[1], 'mig', '',
  'created', int(s.now), 'updated', int(s.now), 'prev', prev, 'prev_inc', prev_inc,
  'version', '1')
for i = 0, turns - 1 do
  local id = call('HGET', KEYS[1], 'ti:' .. int(i))
  local copy = {'ti:' .. int(i), id}
  for k, value in ipairs(turn_values(KEYS[1], id)) do
    if value then
      copy[#copy + 1] = turn_field(id, TURN_FIELDS[k])
      copy[#copy + 1] = value
    end
  end
  call('HSET', KEYS[2], unpack(copy))
end
return session_reply('written', KEYS[2], s.now)
