-- Deletes the index of a replica process that is no more.
-- KEYS: index.
call('DEL', KEYS[1])
return {'done'}
