-- A tenant's ledger tokens, and what is left of its tokens for a minute: a bucket that fills evenly
-- and holds a minute's. What was spent is taken out also below nothing, so that a debt is waited for.
-- KEYS: usage.  ARGV: tokens for a minute; 0: no bucket is kept.
-- Answers 'usage', tokens in the bucket (a debt is negative), tokens in ledgers.
local v = call('HMGET', KEYS[1], 'level', 'at', 'spent', 'ledger')
local most = tonumber(ARGV[1])
if most == 0 then return {'usage', '0', v[4] or '0'} end
local now = now_us()
-- Thousandths of tokens: a bucket that is read often must not lose what it gets between two reads.
local full = 1000 * most
local level = full
if v[1] then
  local passed_us = math.max(0, now - tonumber(v[2]))
  level = math.min(full, tonumber(v[1]) + math.floor(passed_us * most / 60000))
end
level = level - 1000 * tonumber(v[3] or '0')
call('HSET', KEYS[1], 'level', int(level), 'at', int(now), 'spent', '0')
return {'usage', int(math.floor(level / 1000)), v[4] or '0'}
