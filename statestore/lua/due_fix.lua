-- Files a swept session anew, unless it was noted again meanwhile.
-- KEYS: due index.  ARGV: session id, the score as listed, ms from now or '' for never.
if call('ZSCORE', KEYS[1], ARGV[1]) == ARGV[2] then
  if ARGV[3] == '' then
    call('ZREM', KEYS[1], ARGV[1])
  else
    call('ZADD', KEYS[1], int(math.floor(now_us() / 1000) + tonumber(ARGV[3])), ARGV[1])
  end
end
return {'done'}
