-- Sets a flag of a replica process.
-- KEYS: fleet.  ARGV: replica id, incarnation, 'draining' or 'gone', '0' or '1'.
if call('HGET', KEYS[1], 'inc:' .. ARGV[1]) ~= ARGV[2] then return {'replaced'} end
call('HSET', KEYS[1], ARGV[3] .. ':' .. ARGV[1], ARGV[4])
return {'done'}
