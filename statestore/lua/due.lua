-- Notes that a session has to be swept; the earliest time stands. Written before the deadline that
-- it is about, so that none is missed; a note too many costs one look.
-- KEYS: due index.  ARGV: session id, ms from now, ms within which what it is about is written.
local now = math.floor(now_us() / 1000)
local at = now + tonumber(ARGV[2])
local noted = call('ZSCORE', KEYS[1], ARGV[1])
if noted then
  -- A sweep files a session by the record as it was when it looked. So none is to look for an
  -- earlier note's sake until this one's record is written; and a score that no sweep can have
  -- listed keeps one that has looked from filing.
  at = math.min(at, math.max(tonumber(noted), now + tonumber(ARGV[3])))
  at = math.max(at, now + 1)
end
call('ZADD', KEYS[1], int(at), ARGV[1])
return {'done'}
