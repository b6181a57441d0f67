-- KEYS: fleet.  ARGV: replica id, incarnation, counter, load.
local id = ARGV[1]
local stored = tonumber(call('HGET', KEYS[1], 'inc:' .. id) or '0') or 0
local incarnation = tonumber(ARGV[2])
if incarnation < stored then return {'replaced'} end
-- The server lost the registration (or it lapsed, or is damaged): the replica has to write it back.
if incarnation > stored then return {'unknown'} end
call('HSET', KEYS[1], 'beat:' .. id, ARGV[3], 'load:' .. id, ARGV[4],
  'seen:' .. id, int(math.floor(now_us() / 1000)))
return {'done'}
