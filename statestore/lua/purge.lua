-- Deletes a closed session whose retention is over, and each ledger that no session refers to now.
-- KEYS: session, refs, own ledger, inherited ledgers.  ARGV: ids of these ledgers, own first.
local s, none = load(KEYS[1])
if not s then return none end
if s.state ~= 'CLOSED' or tonumber(call('HGET', KEYS[1], 'purge_at')) > s.now then
  return refused(s)
end
call('DEL', KEYS[1])
for i = 3, #KEYS do
  local id = ARGV[i - 2]
  if call('HINCRBY', KEYS[2], 'n:' .. id, -1) <= 0 then
    call('DEL', KEYS[i])
    call('HDEL', KEYS[2], 'n:' .. id, 'e:' .. id)
  end
end
return {'purged'}
