-- Puts a session first into an index. Scores are microseconds, unique within the index, so that a
-- score is a cursor.
-- KEYS: index.  ARGV: session id, '1' to keep the place of one that is there.
if ARGV[2] == '1' and call('ZSCORE', KEYS[1], ARGV[1]) then return {'done'} end
local score = now_us()
local newest = call('ZREVRANGE', KEYS[1], '0', '0', 'WITHSCORES')
if newest[2] then score = math.max(score, tonumber(newest[2]) + 1) end
call('ZADD', KEYS[1], int(score), ARGV[1])
return {'done'}
