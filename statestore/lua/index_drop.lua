-- Takes a session out of an index, unless it was put there only just now: entries are written
-- before the records they point to.
-- KEYS: index.  ARGV: session id, least age in microseconds.
local score = call('ZSCORE', KEYS[1], ARGV[1])
if score and tonumber(score) + tonumber(ARGV[2]) <= now_us() then
  call('ZREM', KEYS[1], ARGV[1])
end
return {'done'}
