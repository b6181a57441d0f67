"""What passes a link, cut into units: Redis commands and their replies, or places in bytes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import anyio

from statestore.scripts import load_script, script_names
from tests.faults.breakpoints import Sighting, Way

RAW_COMMANDS = (b"PSYNC", b"SYNC", b"SUBSCRIBE", b"PSUBSCRIBE", b"MONITOR")
"""After one of these a connection does not answer one reply per command any more."""
_SCRIPTS = {load_script(name).sha.encode(): name for name in script_names()}


@dataclass(slots=True)
class Exchange:
    """What the two directions of one connection know of each other."""

    asked: deque[Sighting] = field(default_factory=deque)
    """Commands whose replies have not passed yet."""
    raw: bool = False
    replicates: bool = False
    """A replica follows the server over it."""


class Scanner:
    """Cuts one direction of a connection into units, with what is known of each."""

    def __init__(
        self,
        link: str,
        way: Way,
        exchange: Exchange,
        *,
        parses: bool,
        marks: Callable[[Way], list[int]],
    ) -> None:
        """``link``: its name. ``parses``: it carries Redis's protocol; otherwise ``marks`` says
        where bytes are to be split."""
        self._link = link
        self._way = way
        self._exchange = exchange
        self._parses = parses
        self._marks = marks
        self._buffer = bytearray()
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Sighting | None]]:
        if self._parses and not self._exchange.raw:
            self._buffer += data
            yield from self._commands() if self._way is Way.UP else self._replies()
            if self._exchange.raw and self._buffer:
                data, self._buffer = bytes(self._buffer), bytearray()
                yield data, None
            return
        yield from self._bytes(data)

    def _bytes(self, data: bytes) -> Iterator[tuple[bytes, Sighting | None]]:
        sighting: Sighting | None = None
        for mark in self._marks(self._way):
            before = mark - self._offset
            if 0 <= before < len(data):
                if before:
                    yield data[:before], sighting
                self._offset += before
                data = data[before:]
                sighting = self._sighting(offset=mark)
        self._offset += len(data)
        yield data, sighting

    def _commands(self) -> Iterator[tuple[bytes, Sighting]]:
        while (parsed := _parse_command(self._buffer)) is not None:
            end, words = parsed
            unit = bytes(self._buffer[:end])
            del self._buffer[:end]
            sighting = self._read_command(words)
            self._exchange.asked.append(sighting)
            yield unit, sighting
            if words and words[0].upper() in RAW_COMMANDS:
                self._exchange.raw = True
                self._exchange.replicates = words[0].upper() in (b"PSYNC", b"SYNC")
                return

    def _read_command(self, words: list[bytes]) -> Sighting:
        name = words[0].upper() if words else b""
        if name not in (b"EVALSHA", b"EVAL") or len(words) < 3:
            return self._sighting(command=name, args=tuple(words[1:]))
        sha = words[1] if name == b"EVALSHA" else hashlib.sha1(words[1]).hexdigest().encode()
        keys = int(words[2])
        session_id = ""
        for key in words[3 : 3 + keys]:
            _, found, rest = key.partition(b":s:")
            session_id = session_id or (rest.decode() if found else "")
        return self._sighting(
            script=_SCRIPTS.get(sha, "?"), session_id=session_id, args=tuple(words[3 + keys :])
        )

    def _replies(self) -> Iterator[tuple[bytes, Sighting | None]]:
        while not self._exchange.raw:
            parsed = _skip_reply(self._buffer, 0)
            if parsed is None:
                return
            end, first = parsed
            unit = bytes(self._buffer[:end])
            del self._buffer[:end]
            if not self._exchange.asked:
                yield unit, None
                continue
            asked = self._exchange.asked.popleft()
            yield (
                unit,
                self._sighting(
                    script=asked.script,
                    command=asked.command,
                    session_id=asked.session_id,
                    args=asked.args,
                    outcome=first.decode(errors="replace"),
                ),
            )

    def _sighting(
        self,
        *,
        script: str = "",
        command: bytes = b"",
        session_id: str = "",
        args: tuple[bytes, ...] = (),
        outcome: str = "",
        offset: int = -1,
    ) -> Sighting:
        return Sighting(
            self._link,
            self._way,
            anyio.current_time(),
            script,
            command,
            session_id,
            args,
            outcome,
            offset,
        )


def _line(buffer: bytearray, at: int) -> tuple[int, bytes] | None:
    end = buffer.find(b"\r\n", at)
    return None if end < 0 else (end + 2, bytes(buffer[at:end]))


def _parse_command(buffer: bytearray) -> tuple[int, list[bytes]] | None:
    """(end, words) of the first whole command (RESP array of bulk strings, or an inline one)."""
    head = _line(buffer, 0)
    if head is None:
        return None
    at, line = head
    if not line.startswith(b"*"):
        return at, line.split()
    words: list[bytes] = []
    for _ in range(int(line[1:])):
        size = _line(buffer, at)
        if size is None:
            return None
        at, line = size
        end = at + int(line[1:])
        if len(buffer) < end + 2:
            return None
        words.append(bytes(buffer[at:end]))
        at = end + 2
    return at, words


def _skip_reply(buffer: bytearray, at: int) -> tuple[int, bytes] | None:
    """(end, first word) of the whole reply at ``at``."""
    head = _line(buffer, at)
    if head is None:
        return None
    at, line = head
    kind, rest = line[:1], line[1:]
    if kind in (b"$", b"=") and rest != b"-1":
        end = at + int(rest)
        return (end + 2, bytes(buffer[at:end][:80])) if len(buffer) >= end + 2 else None
    if kind in (b"*", b"%", b"~", b">") and rest != b"-1":
        first = b""
        for index in range(int(rest) * (2 if kind == b"%" else 1)):
            item = _skip_reply(buffer, at)
            if item is None:
                return None
            at, word = item
            first = word if index == 0 else first
        return at, first
    return at, rest if kind in (b"+", b"-", b":") else b""
