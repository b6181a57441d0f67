-- Turns by index: a session's own, or those that forks inherit from it, also after its purge.
-- KEYS: session.  ARGV: first index, index after the last.
local s, none = load(KEYS[1])
if not s then
  if none[1] ~= 'missing' then return none end
  s = {key = KEYS[1]}
end
local list = {}
for index = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do
  local id = call('HGET', s.key, 'ti:' .. int(index))
  if not id then break end
  list[#list + 1] = turn(s, id)
end
return {'turns', list}
