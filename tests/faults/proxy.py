"""A TCP proxy between real processes, owned by the tests: it delays, throttles, cuts, swallows, and
stops traffic at named places.

A *breakpoint* is a predicate over what a link sees (a Redis command or its reply, parsed; or a
place in a stream of bytes). When it fires, the phase that a scenario wants to hit is reached, and
the log says so; a breakpoint that holds keeps that direction of that connection still until it is
told what to do with what it holds. So a process is killed with, say, its commit applied and not yet
acknowledged, without a hook in the product.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from statestore.scripts import load_script, script_names

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
MEMORY = 4000
"""Sightings that a link remembers."""
RAW_COMMANDS = (b"PSYNC", b"SYNC", b"SUBSCRIBE", b"PSUBSCRIBE", b"MONITOR")
"""After one of these a connection does not answer one reply per command any more."""
_SCRIPTS = {load_script(name).sha.encode(): name for name in script_names()}


class Way(enum.Enum):
    """Direction of traffic: towards the server, or back."""

    UP = "up"
    DOWN = "down"


class Verdict(enum.Enum):
    """What becomes of what a breakpoint holds."""

    PASS = "pass"
    """It goes on, even if its sender is gone: late data."""
    DROP = "drop"
    """It is lost, and the connection with it."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Something that passes a link. ``script``: name of the Lua script (empty: another command).
    ``outcome``: a reply's first word. ``offset``: for breakpoints on bytes, how many passed."""

    link: str
    way: Way
    at: float
    script: str = ""
    command: bytes = b""
    session_id: str = ""
    args: tuple[bytes, ...] = ()
    outcome: str = ""
    offset: int = -1

    @property
    def commits(self) -> bool:
        """An append that also ends its turn."""
        return self.script == "append" and len(self.args) > 8 and self.args[8] != b""

    def __str__(self) -> str:
        what = self.script or self.command.decode(errors="replace") or f"byte {self.offset}"
        commit = " that commits" if self.commits else ""
        answer = f" answered {self.outcome!r}" if self.way is Way.DOWN and self.outcome else ""
        return f"{self.link}: {what}{commit} {self.session_id}{answer}".rstrip()


class Breakpoint:
    """Fires once. ``at_byte`` makes the links split their bytes there, so that ``when`` may ask for
    ``offset``."""

    def __init__(
        self,
        way: Way,
        when: Callable[[Sighting], bool],
        *,
        hold: bool = True,
        at_byte: int | None = None,
    ) -> None:
        self.way = way
        self.when = when
        self.holds = hold
        self.at_byte = at_byte
        self.hit = anyio.Event()
        self.sighting: Sighting | None = None
        self._decided = anyio.Event()
        self._verdict = Verdict.PASS

    def decide(self, verdict: Verdict) -> None:
        """Lets go of what is held. Idempotent; the first verdict counts."""
        if not self._decided.is_set():
            self._verdict = verdict
            self._decided.set()

    async def fire(self, sighting: Sighting) -> Verdict:
        self.sighting = sighting
        self.hit.set()
        if self.holds:
            await self._decided.wait()
        return self._verdict


class _Broken(Exception):
    """This connection ends with a reset."""


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through a link."""

    client: socket.socket
    server: socket.socket
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    asked: deque[Sighting] = field(default_factory=deque)
    """Commands whose replies have not passed yet."""
    raw: bool = False
    swallowed: bool = False
    replicates: bool = False
    """A replica follows the server over it."""
    moved: dict[Way, int] = field(default_factory=lambda: {Way.UP: 0, Way.DOWN: 0})
    received: dict[Way, int] = field(default_factory=lambda: {Way.UP: 0, Way.DOWN: 0})


class Link:
    """One listening address before one server. Rules count for old and new connections alike."""

    def __init__(
        self, name: str, address: tuple[str, int], target: tuple[str, int], *, resp: bool = False
    ) -> None:
        self.name = name
        self.address = address
        self.target = target
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        """0: no limit."""
        self.window_bytes = 0
        """Receive buffer towards the server (0: the system's): a small one keeps a sender in
        mid-send."""
        self.seen: deque[Sighting] = deque(maxlen=MEMORY)
        self.connections: set[Connection] = set()
        self.passed = {Way.UP: 0, Way.DOWN: 0}
        """Bytes that went through."""
        self.resets = 0
        self._resp = resp
        self._breakpoints: list[Breakpoint] = []
        self._refusing = False
        self._hole: anyio.Event | None = None
        self._hole_ways: frozenset[Way] = frozenset()
        self._hole_replication_only = False
        self._listener = socket.create_server(address, backlog=128)
        self._listener.setblocking(False)
        self.address = self._listener.getsockname()[:2]

    @property
    def endpoint(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    # -- rules --------------------------------------------------------------------------------

    def arm(self, point: Breakpoint) -> None:
        self._breakpoints.append(point)

    def disarm(self, point: Breakpoint) -> None:
        if point in self._breakpoints:
            self._breakpoints.remove(point)

    def cut(self) -> None:
        """Resets every connection, and every new one until :meth:`heal`."""
        self._refusing = True
        self.reset()

    def reset(self) -> None:
        """Resets every connection there is now."""
        for connection in [*self.connections]:
            self.resets += 1
            connection.scope.cancel()

    def half_open(
        self, ways: Iterable[Way] = (Way.UP, Way.DOWN), *, replication_only: bool = False
    ) -> None:
        """Nothing arrives any more and nobody is told, until :meth:`heal`; connections that tried
        to say something meanwhile are then reset."""
        self._hole, self._hole_ways = anyio.Event(), frozenset(ways)
        self._hole_replication_only = replication_only

    def heal(self) -> None:
        """Ends every rule but breakpoints."""
        self._refusing = False
        self.delay_s = self.bytes_per_s = 0.0
        hole, self._hole = self._hole, None
        if hole is not None:
            hole.set()

    # -- traffic ------------------------------------------------------------------------------

    async def serve(self, tasks: TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                client, _ = await loop.sock_accept(self._listener)
                client.setblocking(False)
                if self._refusing:
                    _reset(client)
                    continue
                tasks.start_soon(self._serve_connection, client, name=f"proxy {self.name}")
        finally:
            self._listener.close()

    async def _serve_connection(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setblocking(False)
        if self.window_bytes:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.window_bytes)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(client, server)
        orderly = False
        try:
            await asyncio.get_running_loop().sock_connect(server, self.target)
            self.connections.add(connection)
            with connection.scope:
                async with anyio.create_task_group() as pumps:
                    pumps.start_soon(self._pump, connection, Way.UP)
                    pumps.start_soon(self._pump, connection, Way.DOWN)
                orderly = True
        except* (OSError, _Broken) as broken:
            log.debug("%s: %s", self.name, broken.exceptions[0])
        finally:
            self.connections.discard(connection)
            for end in (client, server):
                if orderly:
                    end.close()
                else:
                    _reset(end)

    async def _pump(self, connection: Connection, way: Way) -> None:
        loop = asyncio.get_running_loop()
        source, sink = connection.client, connection.server
        if way is Way.DOWN:
            source, sink = sink, source
        scanner = _Scanner(self, connection, way)
        while True:
            try:
                data = await loop.sock_recv(source, CHUNK_BYTES)
            except ConnectionError:
                if not self._resp or way is Way.DOWN:
                    raise
                data = b""  # what was sent before is still to be processed
            if not data:
                break
            connection.received[way] += len(data)
            ready = b""
            for unit, sighting in scanner.feed(data):
                point = None if sighting is None else self._look(sighting)
                if point is not None and sighting is not None:
                    await self._forward(connection, way, sink, ready)
                    ready = b""
                    if await point.fire(sighting) is Verdict.DROP:
                        raise _Broken(f"dropped at {sighting}")
                ready += unit
            await self._forward(connection, way, sink, ready)
        sink.shutdown(socket.SHUT_WR)

    def _look(self, sighting: Sighting) -> Breakpoint | None:
        """Remembers it; the breakpoint that it sets off, if any."""
        self.seen.append(sighting)
        for point in self._breakpoints:
            if point.way is sighting.way and not point.hit.is_set() and point.when(sighting):
                self.disarm(point)
                return point
        return None

    async def _forward(
        self, connection: Connection, way: Way, sink: socket.socket, data: bytes
    ) -> None:
        if not data:
            return
        loop = asyncio.get_running_loop()
        in_hole = connection.replicates or not self._hole_replication_only
        if self._hole is not None and way in self._hole_ways and in_hole:
            connection.swallowed = True
            await self._hole.wait()
            raise _Broken("was half open")
        if self.delay_s:
            await anyio.sleep(self.delay_s)
        while data:
            part = data
            if self.bytes_per_s:
                part = data[: max(1, int(self.bytes_per_s / 50))]
                await anyio.sleep(len(part) / self.bytes_per_s)
            await loop.sock_sendall(sink, part)
            connection.moved[way] += len(part)
            self.passed[way] += len(part)
            data = data[len(part) :]

    def marks(self, way: Way) -> list[int]:
        """Places in the bytes where a breakpoint waits, in order."""
        return sorted(
            point.at_byte
            for point in self._breakpoints
            if point.way is way and point.at_byte is not None
        )

    @property
    def parses(self) -> bool:
        return self._resp


class _Scanner:
    """Cuts one direction of a connection into units, with what is known of each."""

    def __init__(self, link: Link, connection: Connection, way: Way) -> None:
        self._link = link
        self._connection = connection
        self._way = way
        self._buffer = bytearray()
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Sighting | None]]:
        if self._link.parses and not self._connection.raw:
            self._buffer += data
            yield from self._commands() if self._way is Way.UP else self._replies()
            if self._connection.raw and self._buffer:
                data, self._buffer = bytes(self._buffer), bytearray()
                yield data, None
            return
        yield from self._bytes(data)

    def _bytes(self, data: bytes) -> Iterator[tuple[bytes, Sighting | None]]:
        sighting: Sighting | None = None
        for mark in self._link.marks(self._way):
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
            self._connection.asked.append(sighting)
            yield unit, sighting
            if words and words[0].upper() in RAW_COMMANDS:
                self._connection.raw = True
                self._connection.replicates = words[0].upper() in (b"PSYNC", b"SYNC")
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
        while not self._connection.raw:
            parsed = _skip_reply(self._buffer, 0)
            if parsed is None:
                return
            end, first = parsed
            unit = bytes(self._buffer[:end])
            del self._buffer[:end]
            if not self._connection.asked:
                yield unit, None
                continue
            asked = self._connection.asked.popleft()
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
            self._link.name,
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


def _reset(end: socket.socket) -> None:
    """Closes with a reset instead of an orderly end."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


class Proxy:
    """The links of one fleet. ``tasks`` owns their traffic."""

    def __init__(self, tasks: TaskGroup) -> None:
        self.links: dict[str, Link] = {}
        self.log: list[str] = []
        self._tasks = tasks

    def add(
        self, name: str, address: tuple[str, int], target: tuple[str, int], *, resp: bool = False
    ) -> Link:
        link = self.links[name] = Link(name, address, target, resp=resp)
        self._tasks.start_soon(link.serve, self._tasks, name=f"proxy {name}")
        return link

    def arm(self, links: Iterable[str], point: Breakpoint) -> Breakpoint:
        """One breakpoint on several links: the first that sees it."""
        for name in links:
            self.links[name].arm(point)
        return point

    def disarm(self, point: Breakpoint) -> None:
        for link in self.links.values():
            link.disarm(point)
        point.decide(Verdict.PASS)

    def heal(self) -> None:
        for link in self.links.values():
            link.heal()

    def sightings(self, **wanted: object) -> Iterator[Sighting]:
        """What passed lately, link by link, with these attributes."""
        for link in self.links.values():
            for sighting in link.seen:
                if all(getattr(sighting, name) == value for name, value in wanted.items()):
                    yield sighting
