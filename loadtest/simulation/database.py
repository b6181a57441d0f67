"""The few commands of Redis that scripts use, over Python dicts (``statestore/scripts.py`` lists
them). Stricter than a server: a script may touch only the keys that it declares."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

from loadtest.simulation.loop import SimulationError


class ScriptFault(SimulationError):
    """A script did what a server or a cluster would refuse. Always a bug, so it is raised through
    the adapter, not returned."""


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
