-- KEYS: ledger.  ARGV: first byte, last byte.
return call('GETRANGE', KEYS[1], ARGV[1], ARGV[2])
