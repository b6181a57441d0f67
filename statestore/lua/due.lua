-- Notes that a session has to be swept; the earliest time stands. Written before the deadline that
-- it is about, so that none is missed; a note too many costs one look.
-- KEYS: due index.  ARGV: session id, ms from now.
local at = math.floor(now_us() / 1000) + tonumber(ARGV[2])
local noted = call('ZSCORE', KEYS[1], ARGV[1])
if not noted or at < tonumber(noted) then
  call('ZADD', KEYS[1], int(at), ARGV[1])
end
return {'done'}
