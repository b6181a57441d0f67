-- A replica process says what it is. The fleet is one hash: <field>:<replica id>.
-- KEYS: fleet.  ARGV: replica id, details, '' for a new incarnation or the one to write back,
-- '1' if it drains.
local id, us = ARGV[1], now_us()
local stored = tonumber(call('HGET', KEYS[1], 'inc:' .. id) or '0') or 0
local incarnation
if ARGV[3] == '' then
  incarnation = math.max(stored + 1, us)
else
  incarnation = tonumber(ARGV[3])
  if incarnation < stored then return {'replaced'} end
end
if stored > 0 and stored < incarnation then
  call('HSET', KEYS[1], 'replaced:' .. id, int(stored))
end
call('HSET', KEYS[1], 'inc:' .. id, int(incarnation), 'details:' .. id, ARGV[2],
  'beat:' .. id, '0', 'load:' .. id, '', 'draining:' .. id, ARGV[4], 'gone:' .. id, '0',
  'seen:' .. id, int(math.floor(us / 1000)))
return {'registered', int(incarnation)}
