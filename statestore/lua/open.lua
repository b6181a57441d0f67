-- Makes a session, or returns the one that is there (a retry derives the same id).
-- KEYS: session, ledger, refs.  ARGV: id, tenant, model, preamble, root, leading, labels.
local s, none = load(KEYS[1])
if s then return written(s) end
local no = taken(none, KEYS[1], KEYS[3], ARGV[1])
if no then return no end
local now = math.floor(now_us() / 1000)
-- The ledger exists from the start: hot scripts declare only keys that exist.
call('SET', KEYS[2], '')
call('HSET', KEYS[3], 'n:' .. ARGV[1], '1')
call('HSET', KEYS[1],
  'schema', int(SCHEMA), 'min_reader', int(SCHEMA), 'id', ARGV[1], 'tenant', ARGV[2],
  'model', ARGV[3], 'state', 'OPEN', 'epoch', '0', 'nonce', '', 'owner', '', 'owner_inc', '0',
  'length', '0', 'digest', ARGV[5], 'root', ARGV[5], 'turn_index', '0', 'active', '',
  'deadline', '0', 'segments', '', 'own_base', '0', 'preamble', ARGV[4], 'leading', ARGV[6],
  'fingerprint', '', 'labels', ARGV[7], 'parent', '', 'mig', '', 'created', int(now),
  'updated', int(now), 'prev', '', 'version', '1')
return session_reply('written', KEYS[1], now)
