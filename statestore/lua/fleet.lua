-- All replicas: id, incarnation, details, heartbeat, load, draining, gone; and the processes that
-- are no more: id, incarnation. Forgets replicas that were silent for too long.
-- KEYS: fleet.  ARGV: ms until a silent replica is forgotten.
local FIELDS = {'inc', 'details', 'beat', 'load', 'draining', 'gone', 'seen'}
local now = math.floor(now_us() / 1000)
local flat = call('HGETALL', KEYS[1])
local values, ids = {}, {}
for i = 1, #flat, 2 do
  values[flat[i]] = flat[i + 1]
  if string.sub(flat[i], 1, 4) == 'inc:' then ids[#ids + 1] = string.sub(flat[i], 5) end
end
table.sort(ids)
local list, past = {}, {}
for _, id in ipairs(ids) do
  if values['replaced:' .. id] then
    past[#past + 1] = {id, values['replaced:' .. id]}
    call('HDEL', KEYS[1], 'replaced:' .. id)
  end
  -- A damaged field is put right by the next heartbeat.
  local seen = tonumber(values['seen:' .. id] or '') or now
  if seen + tonumber(ARGV[1]) < now then
    past[#past + 1] = {id, values['inc:' .. id]}
    for _, field in ipairs(FIELDS) do call('HDEL', KEYS[1], field .. ':' .. id) end
  else
    list[#list + 1] = {
      id, values['inc:' .. id], values['details:' .. id], values['beat:' .. id],
      values['load:' .. id], values['draining:' .. id], values['gone:' .. id],
    }
  end
end
return {list, past}
