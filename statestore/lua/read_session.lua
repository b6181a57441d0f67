-- KEYS: session.
local s, none = load(KEYS[1])
if not s then return none end
return written(s)
