-- Ends a turn as CANCELLED where the ledger stands; an unknown id leaves a tombstone.
-- KEYS: session.  ARGV: turn id, tombstone ttl ms, most tombstones.
local id = ARGV[1]
local s, none = load(KEYS[1], id)
if not s then return none end
if s.turn_status then
  if not ended(s.turn_status) then
    if not end_if_due(s) then
      end_turn(s, 'CANCELLED', 'cancelled', '')
    end
    save(s)
  end
  return {'ended', turn(s, id)}
end
if s.state == 'CLOSED' then return {'unknown'} end
-- A ring of bounded size: the oldest tombstone makes room for the newest.
local tombstone = 'x:' .. id
if not call('HGET', KEYS[1], tombstone) then
  local n = call('HINCRBY', KEYS[1], 'tombstones', 1)
  local slot = 'xs:' .. int(n % tonumber(ARGV[3]))
  local oldest = call('HGET', KEYS[1], slot)
  if oldest then call('HDEL', KEYS[1], 'x:' .. oldest) end
  put(s, slot, id)
end
put(s, tombstone, int(s.now + tonumber(ARGV[2])))
save(s)
return {'unknown'}
