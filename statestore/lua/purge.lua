-- Deletes a closed session whose retention is over, but for the tokens and turns that forks refer
-- to: these go with the last of the forks. Its id is remembered for a while, so that no late repeat
-- of the request that made it makes it anew; the sweep forgets it.
-- KEYS: session, ledger, refs, then record and ledger of each ancestor.  ARGV: ms to remember it,
-- session id, ids of the ancestors.
local s, none = load(KEYS[1])
if not s then return none end
local v = call('HMGET', KEYS[1], 'purge_at', 'segments')
if s.state ~= 'CLOSED' or tonumber(v[1]) > s.now then return refused(s) end

local function release(id, record, ledger)
  if call('HINCRBY', KEYS[3], 'n:' .. id, -1) > 0 then return false end
  call('DEL', record, ledger)
  call('HDEL', KEYS[3], 'n:' .. id, 'tokens:' .. id, 'turns:' .. id)
  return true
end

local id = ARGV[2]
call('HSET', KEYS[3], 'gone:' .. id, int(s.now + tonumber(ARGV[1])))
if not release(id, KEYS[1], KEYS[2]) then
  local far = call('HMGET', KEYS[3], 'tokens:' .. id, 'turns:' .. id)
  truncate(KEYS[2], tonumber(far[1] or '0') - s.own_base)
  local kept = {}
  for index = inherited_turns(parse_segments(v[2])), tonumber(far[2]) - 1 do
    local turn_id = call('HGET', KEYS[1], 'ti:' .. int(index))
    kept[#kept + 1] = {index = index, id = turn_id, values = turn_values(KEYS[1], turn_id)}
  end
  call('DEL', KEYS[1])
  call('HSET', KEYS[1], 'min_reader', int(SCHEMA), 'state', 'PURGED')
  for _, t in ipairs(kept) do write_turn(KEYS[1], t.id, t.index, t.values) end
end
for i = 3, #ARGV do release(ARGV[i], KEYS[2 * i - 2], KEYS[2 * i - 1]) end
return {'purged'}
