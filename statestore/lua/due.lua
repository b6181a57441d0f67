-- Notes that a session has to be swept; the earliest time stands. Written before the deadline that
-- it is about, so that none is missed; a note too many costs one look.
-- KEYS: due index.  ARGV: session id, ms from now.
local now = math.floor(now_us() / 1000)
local at = now + tonumber(ARGV[2])
local noted = call('ZSCORE', KEYS[1], ARGV[1])
if noted then
  -- A sweep may be at it, with the record as it was: another score than any it can have listed
  -- keeps it from filing the session by that record.
  at = math.max(math.min(at, tonumber(noted)), now + 1)
end
call('ZADD', KEYS[1], int(at), ARGV[1])
return {'done'}
