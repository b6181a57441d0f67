-- Turns by index.
-- KEYS: session.  ARGV: first index, count.
local s, none = load(KEYS[1])
if not s then return none end
local list = {}
local first = tonumber(ARGV[1])
for index = first, first + tonumber(ARGV[2]) - 1 do
  local id = call('HGET', KEYS[1], 'ti:' .. int(index))
  if not id then break end
  list[#list + 1] = turn(s, id)
end
return {'turns', list}
