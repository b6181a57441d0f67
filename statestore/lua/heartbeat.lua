-- KEYS: fleet.  ARGV: replica id, incarnation, counter, load.
-- Answers with the counter that was there before. One that comes late, behind a higher counter,
-- changes nothing: observers would take the next one for silence.
local id = ARGV[1]
local stored = tonumber(call('HGET', KEYS[1], 'inc:' .. id) or '0') or 0
local incarnation = tonumber(ARGV[2])
if incarnation < stored then return {'replaced'} end
-- The server lost the registration (or it lapsed, or is damaged): the replica has to write it back.
if incarnation > stored then return {'unknown'} end
local before = string.match(call('HGET', KEYS[1], 'beat:' .. id) or '', '^%d+$') or '0'
if tonumber(ARGV[3]) < tonumber(before) then return {'done', before} end
call('HSET', KEYS[1], 'beat:' .. id, ARGV[3], 'load:' .. id, ARGV[4],
  'seen:' .. id, int(math.floor(now_us() / 1000)))
return {'done', before}
