-- Turns by index: a session's own, or those that forks inherit from it, also after its purge.
-- Fewer if they are large.
-- KEYS: session.  ARGV: first index, index after the last, bytes after which no more are read.
local s, none = load(KEYS[1])
if not s then
  if none[1] ~= 'missing' then return none end
  s = {key = KEYS[1]}
end
local list, bytes = {}, 0
for index = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do
  local id = call('HGET', s.key, 'ti:' .. int(index))
  if not id or bytes > tonumber(ARGV[3]) then break end
  local values = turn(s, id)
  for _, value in ipairs(values) do bytes = bytes + #(value or '') end
  list[#list + 1] = values
end
return {'turns', list}
