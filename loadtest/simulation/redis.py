"""Redis in process: the real Lua scripts over Python dicts.

:class:`LuaExecutor` runs the very text that a server would run, in a Lua 5.1 interpreter (lupa),
over the few commands that ``statestore/scripts.py`` lists. It is stricter than a single server: a
script may touch only the keys it declares, and all of them must be in one hash slot, as in a
cluster. It is kinder in one respect: it forgets nothing unless told to, by :meth:`restore` or by
the fault hook.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lupa.lua51 import LuaError, LuaRuntime, lua_type

from loadtest.simulation.database import Answer, Database, ScriptFault, Status, Value
from statestore.executor import Reply, Script, ScriptCall
from statestore.ports import StoreError, StoreUnavailable

MAX_TABLE_DEPTH = 32
"""Nesting of a script's reply at most (a cyclic table would never end)."""


class Fault(enum.Enum):
    """What happens to one call."""

    NONE = enum.auto()
    REQUEST_LOST = enum.auto()
    """Not applied; the caller times out."""
    REPLY_LOST = enum.auto()
    """Applied; the caller times out."""


FaultHook = Callable[[ScriptCall], Fault]


def no_fault(call: ScriptCall) -> Fault:
    """The hook of a perfect network."""
    del call
    return Fault.NONE


def hash_tag(key: bytes) -> bytes:
    """The part of a key that decides its slot: between the first ``{`` and the next ``}``."""
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1)
    return key[begin + 1 : end] if begin >= 0 and end > begin + 1 else key


_SANDBOX = b"""
local call = ...
local environment = {redis = {call = call}}
for _, name in ipairs({'assert', 'error', 'getmetatable', 'ipairs', 'math', 'next', 'pairs',
                       'pcall', 'rawequal', 'rawget', 'rawset', 'select', 'setmetatable',
                       'string', 'table', 'tonumber', 'tostring', 'type', 'unpack', 'xpcall'}) do
  environment[name] = _G[name]
end
setmetatable(environment, {
  __newindex = function(_, name) error('script writes the global ' .. tostring(name), 2) end,
  __index = function(_, name) error('script reads the unknown global ' .. tostring(name), 2) end,
})
return function(source, name)
  local chunk, problem = loadstring(source, name)
  if not chunk then
    return problem
  end
  return setfenv(chunk, environment)()
end
"""


class LuaExecutor:
    """Implements :class:`statestore.executor.ScriptExecutor`.

    ``time_us`` is the server's clock (Unix microseconds). ``delay`` is awaited before a pipeline
    is applied and again before its replies are delivered: a caller that is cancelled in the second
    has written. ``give_up`` is awaited with the time limit, once, when a call of the pipeline gets
    no answer. ``fault`` is asked once per call.
    """

    def __init__(
        self,
        time_us: Callable[[], int],
        *,
        delay: Callable[[], Awaitable[None]] | None = None,
        give_up: Callable[[float], Awaitable[None]] | None = None,
        fault: FaultHook = no_fault,
    ) -> None:
        self.fault = fault
        self._delay = delay
        self._give_up = give_up
        self._db = Database(time_us)
        self._scripts: dict[str, Any] = {}
        self._lua = LuaRuntime(encoding=None, register_eval=False, unpack_returned_tuples=False)
        self._raised: ScriptFault | None = None
        self._load = self._lua.execute(_SANDBOX, self._call_from_lua)

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        if self._delay is not None:
            await self._delay()
        replies: list[Reply | StoreError] = [self._execute_one(call) for call in calls]
        if any(isinstance(reply, StoreUnavailable) for reply in replies):
            if self._give_up is not None:
                await self._give_up(timeout_s)
        elif self._delay is not None:
            await self._delay()
        return replies

    async def aclose(self) -> None:
        """Nothing to close; the data stays."""

    def run_now(self, call: ScriptCall) -> Reply:
        """Applies one call without network, delay or faults."""
        keys = [key.encode() for key in call.keys]
        tags = {hash_tag(key) for key in keys}
        if len(tags) > 1:
            raise ScriptFault(f"{call.script.name}: keys in several slots: {sorted(keys)}")
        self._db.declared = frozenset(keys)
        args = [a if isinstance(a, bytes) else str(a).encode() for a in call.args]
        self._raised = None
        function = self._compiled(call.script)
        try:
            result = function(self._lua.table_from(keys), self._lua.table_from(args))
            return _to_reply(result, 0)
        except LuaError as error:
            raise ScriptFault(f"{call.script.name}: {self._raised or error}") from error
        finally:
            self._db.declared = frozenset()

    def peek(self, key: str) -> Value | None:
        """What is stored at a key; not to be changed."""
        return self._db.data.get(key.encode())

    def snapshot(self) -> dict[bytes, Value]:
        """A copy of all data, for :meth:`restore`."""
        return self._db.snapshot()

    def restore(self, snapshot: dict[bytes, Value]) -> None:
        """Makes the data what it was: the server lost every write since."""
        self._db.data = {k: v if isinstance(v, bytes) else v.copy() for k, v in snapshot.items()}

    def _execute_one(self, call: ScriptCall) -> Reply | StoreError:
        fault = self.fault(call)
        if fault is Fault.REQUEST_LOST:
            return StoreUnavailable(f"{call.script.name}: no answer")
        reply = self.run_now(call)
        if fault is Fault.REPLY_LOST:
            return StoreUnavailable(f"{call.script.name}: no answer")
        return reply

    def _compiled(self, script: Script) -> Any:
        function = self._scripts.get(script.sha)
        if function is None:
            source = f"return function(KEYS, ARGV) {script.source}\nend".encode()
            function = self._load(source, b"@" + script.name.encode())
            if isinstance(function, bytes):
                raise ScriptFault(f"{script.name} does not compile: {function!r}")
            self._scripts[script.sha] = function
        return function

    def _call_from_lua(self, name: bytes, *args: object) -> object:
        try:
            return self._to_lua(self._db.run(name, [_argument(a) for a in args]))
        except ScriptFault as fault:
            self._raised = fault
            raise
        except ValueError as error:
            self._raised = ScriptFault(f"{name!r}{args!r}: {error}")
            raise

    def _to_lua(self, answer: Answer) -> object:
        if answer is None:
            return False
        if isinstance(answer, list):
            return self._lua.table_from([self._to_lua(part) for part in answer])
        if isinstance(answer, Status):
            return self._lua.table_from({b"ok": bytes(answer)})
        return answer


def _argument(value: object) -> bytes:
    """What a Lua value becomes as an argument of a command."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return b"%.17g" % value
    raise ScriptFault(f"arguments of commands must be strings or numbers, not {value!r}")


def _to_reply(value: Any, depth: int) -> Reply:
    """What a script's result becomes on the wire: numbers are truncated, false is nil, true is 1,
    tables end at their first nil."""
    if depth > MAX_TABLE_DEPTH:
        raise ScriptFault("the reply is nested too deeply")
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, bytes):
        return value
    if isinstance(value, int | float):
        return int(value)
    if lua_type(value) != "table":
        raise ScriptFault(f"a script cannot return {value!r}")
    if value[b"err"] is not None:
        raise ScriptFault(f"error reply: {value[b'err']!r}")
    if value[b"ok"] is not None:
        return bytes(value[b"ok"])
    items: list[Reply] = []
    while (item := value[len(items) + 1]) is not None:
        items.append(_to_reply(item, depth + 1))
    return items
