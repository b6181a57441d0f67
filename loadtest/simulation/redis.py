"""Redis in process: the real Lua scripts over Python dicts.

:class:`LuaExecutor` runs the very text that a server would run, in a Lua 5.1 interpreter (lupa),
over the few commands that ``statestore/scripts.py`` lists. It is stricter than a single server: a
script may touch only the keys it declares, and all of them must be in one hash slot, as in a
cluster. It is kinder in one respect: it forgets nothing unless told to, by :meth:`restore` or by
the fault hook.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lupa.lua51 import LuaError, LuaRuntime, lua_type

from loadtest.simulation.loop import SimulationError
from statestore.executor import Reply, Script, ScriptCall
from statestore.ports import StoreError, StoreUnavailable

MAX_TABLE_DEPTH = 32
"""Nesting of a script's reply at most (a cyclic table would never end)."""


class ScriptFault(SimulationError):
    """A script did what a server or a cluster would refuse. Always a bug, so it is raised through
    the adapter, not returned."""


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


class SortedSet:
    """Members ordered by (score, member), as in Redis."""

    def __init__(self) -> None:
        self.scores: dict[bytes, float] = {}
        self.order: list[tuple[float, bytes]] = []

    def add(self, member: bytes, score: float) -> bool:
        """True if the member is new."""
        new = not self.remove(member)
        self.scores[member] = score
        insort(self.order, (score, member))
        return new

    def remove(self, member: bytes) -> bool:
        """True if the member was there."""
        score = self.scores.pop(member, None)
        if score is None:
            return False
        del self.order[bisect_left(self.order, (score, member))]
        return True

    def copy(self) -> SortedSet:
        other = SortedSet()
        other.scores, other.order = dict(self.scores), list(self.order)
        return other


Value = bytes | dict[bytes, bytes] | SortedSet


class Status(bytes):
    """A status reply (``OK``)."""


Answer = bytes | int | None | list[Any]


class Database:
    """Keys, and the commands over them. ``time_us`` is the server's clock, Unix microseconds."""

    def __init__(self, time_us: Callable[[], int]) -> None:
        self._time_us = time_us
        self.data: dict[bytes, Value] = {}
        self.declared: frozenset[bytes] = frozenset()
        """Keys that the running script may touch."""
        self._commands: dict[bytes, Callable[[list[bytes]], Answer]] = {
            name.removeprefix("_cmd_").upper().encode(): getattr(self, name)
            for name in dir(self)
            if name.startswith("_cmd_")
        }

    def run(self, name: bytes, args: list[bytes]) -> Answer:
        """Runs one command of a script; ScriptFault for what a server would refuse."""
        command = self._commands.get(name.upper())
        if command is None:
            raise ScriptFault(f"command {name!r} is not among those that scripts may use")
        return command(args)

    def snapshot(self) -> dict[bytes, Value]:
        return {k: v if isinstance(v, bytes) else v.copy() for k, v in self.data.items()}

    def _at(self, key: bytes) -> Value | None:
        if key not in self.declared:
            raise ScriptFault(f"key {key!r} is not declared (declared: {sorted(self.declared)})")
        return self.data.get(key)

    def _string(self, key: bytes) -> bytes:
        value = self._at(key)
        if value is None:
            return b""
        if not isinstance(value, bytes):
            raise ScriptFault(f"WRONGTYPE: {key!r} is no string")
        return value

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        """The hash at a key; a missing one reads as empty and is not made."""
        value = self._at(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ScriptFault(f"WRONGTYPE: {key!r} is no hash")
        return value

    def _sorted_set(self, key: bytes) -> SortedSet:
        value = self._at(key)
        if value is None:
            return SortedSet()
        if not isinstance(value, SortedSet):
            raise ScriptFault(f"WRONGTYPE: {key!r} is no sorted set")
        return value

    # -- commands -----------------------------------------------------------------------------

    def _cmd_time(self, args: list[bytes]) -> Answer:
        seconds, micros = divmod(self._time_us(), 1_000_000)
        return [b"%d" % seconds, b"%d" % micros]

    def _cmd_exists(self, args: list[bytes]) -> Answer:
        return sum(self._at(key) is not None for key in args)

    def _cmd_del(self, args: list[bytes]) -> Answer:
        present = [key for key in args if self._at(key) is not None]
        for key in present:
            self.data.pop(key, None)
        return len(set(present))

    def _cmd_get(self, args: list[bytes]) -> Answer:
        (key,) = args
        return None if self._at(key) is None else self._string(key)

    def _cmd_set(self, args: list[bytes]) -> Answer:
        key, value = args
        self._at(key)
        self.data[key] = value
        return Status(b"OK")

    def _cmd_append(self, args: list[bytes]) -> Answer:
        key, more = args
        value = self.data[key] = self._string(key) + more
        return len(value)

    def _cmd_strlen(self, args: list[bytes]) -> Answer:
        (key,) = args
        return len(self._string(key))

    def _cmd_getrange(self, args: list[bytes]) -> Answer:
        key, first, last = args
        value = self._string(key)
        start, stop = _slice(len(value), first, last)
        return value[start:stop]

    def _cmd_hget(self, args: list[bytes]) -> Answer:
        key, name = args
        return self._hash(key).get(name)

    def _cmd_hmget(self, args: list[bytes]) -> Answer:
        key, *names = args
        values = self._hash(key)
        return [values.get(name) for name in names]

    def _cmd_hgetall(self, args: list[bytes]) -> Answer:
        (key,) = args
        return [part for pair in self._hash(key).items() for part in pair]

    def _cmd_hset(self, args: list[bytes]) -> Answer:
        key, *pairs = args
        if not pairs or len(pairs) % 2:
            raise ScriptFault("HSET needs pairs of field and value")
        values = self._hash(key)
        before = len(values)
        values.update(zip(pairs[::2], pairs[1::2], strict=True))
        self.data[key] = values
        return len(values) - before

    def _cmd_hdel(self, args: list[bytes]) -> Answer:
        key, *names = args
        values = self._hash(key)
        removed = sum(values.pop(name, None) is not None for name in names)
        if not values:
            self.data.pop(key, None)
        return removed

    def _cmd_hincrby(self, args: list[bytes]) -> Answer:
        key, name, increment = args
        values = self._hash(key)
        value = int(values.get(name, b"0")) + int(increment)
        values[name] = b"%d" % value
        self.data[key] = values
        return value

    def _cmd_zadd(self, args: list[bytes]) -> Answer:
        key, score, member = args
        members = self._sorted_set(key)
        new = members.add(member, float(score))
        self.data[key] = members
        return int(new)

    def _cmd_zrem(self, args: list[bytes]) -> Answer:
        key, member = args
        members = self._sorted_set(key)
        removed = members.remove(member)
        if not members.scores:
            self.data.pop(key, None)
        return int(removed)

    def _cmd_zcard(self, args: list[bytes]) -> Answer:
        (key,) = args
        return len(self._sorted_set(key).scores)

    def _cmd_zscore(self, args: list[bytes]) -> Answer:
        key, member = args
        score = self._sorted_set(key).scores.get(member)
        return None if score is None else _format_score(score)

    def _cmd_zrevrange(self, args: list[bytes]) -> Answer:
        key, first, last, *options = args
        order = self._sorted_set(key).order[::-1]
        start, stop = _slice(len(order), first, last)
        return _members(order[start:stop], options)

    def _cmd_zrangebyscore(self, args: list[bytes]) -> Answer:
        key, low, high, *options = args
        return self._by_score(self._sorted_set(key).order, low, high, options)

    def _cmd_zrevrangebyscore(self, args: list[bytes]) -> Answer:
        key, high, low, *options = args
        return self._by_score(self._sorted_set(key).order[::-1], low, high, options)

    @staticmethod
    def _by_score(
        order: list[tuple[float, bytes]], low: bytes, high: bytes, options: list[bytes]
    ) -> Answer:
        above, low_open = _bound(low)
        below, high_open = _bound(high)
        found = [
            (score, member)
            for score, member in order
            if (above < score if low_open else above <= score)
            and (score < below if high_open else score <= below)
        ]
        return _members(found, options)


def _slice(length: int, first: bytes, last: bytes) -> tuple[int, int]:
    """Redis's inclusive range, negative indices from the end, as a Python slice."""
    start, end = int(first), int(last)
    start = max(0, start + length) if start < 0 else start
    end = end + length if end < 0 else end
    return start, max(start, min(end, length - 1) + 1)


def _bound(text: bytes) -> tuple[float, bool]:
    is_open = text.startswith(b"(")
    return float(text.removeprefix(b"(")), is_open


def _members(found: list[tuple[float, bytes]], options: list[bytes]) -> Answer:
    rest = [option.upper() for option in options]
    scores = b"WITHSCORES" in rest
    if scores:
        rest.remove(b"WITHSCORES")
    if rest:
        if rest[0] != b"LIMIT" or len(rest) != 3:
            raise ScriptFault(f"options {options!r} are not supported")
        offset, count = int(rest[1]), int(rest[2])
        found = found[offset:] if count < 0 else found[offset : offset + count]
    if not scores:
        return [member for _, member in found]
    return [part for score, member in found for part in (member, _format_score(score))]


def _format_score(score: float) -> bytes:
    return b"%d" % int(score) if score.is_integer() else repr(score).encode()


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
