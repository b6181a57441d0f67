-- Gets or renews a lease. The token outlives the lease, so that it only grows.
-- KEYS: lease.  ARGV: holder, ttl ms.
local us = now_us()
local now = math.floor(us / 1000)
local v = call('HMGET', KEYS[1], 'holder', 'token', 'until')
local token = tonumber(v[2] or '0')
if v[1] ~= ARGV[1] then
  if v[1] and tonumber(v[3]) > now then return {'held'} end
  token = math.max(token + 1, us)
end
call('HSET', KEYS[1], 'holder', ARGV[1], 'token', int(token), 'until', int(now + tonumber(ARGV[2])))
return {'acquired', int(token)}
