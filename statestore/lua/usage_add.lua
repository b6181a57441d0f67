-- Counts what a replica has written for a tenant. Replicas tell sums of their own, so that a report
-- that is repeated, or lost, changes nothing in the end.
-- KEYS: usage.  ARGV: replica id, incarnation, number of the sum (it grows when a replica begins one
-- anew), tokens of the sum.
local field = 'r:' .. ARGV[1]
local known = call('HGET', KEYS[1], field) or '0 0 0'
local inc, number, sum = string.match(known, '^(%d+) (%d+) (%d+)$')
inc, number, sum = tonumber(inc), tonumber(number), tonumber(sum)
local new_inc, new_number, new_sum = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if new_inc < inc or (new_inc == inc and new_number < number) then return {'done'} end
if new_inc > inc or new_number > number then sum = 0 end
if new_sum <= sum then return {'done'} end
call('HSET', KEYS[1], field, int(new_inc) .. ' ' .. int(new_number) .. ' ' .. int(new_sum))
call('HINCRBY', KEYS[1], 'spent', int(new_sum - sum))
call('HINCRBY', KEYS[1], 'ledger', int(new_sum - sum))
return {'done'}
