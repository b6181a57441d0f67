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
import logging
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from tests.faults.breakpoints import Breakpoint, Sighting, Verdict, Way
from tests.faults.resp import Exchange, Scanner

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
PART_S = 0.02
"""A throttled connection passes as much at once as it may pass in this time."""
MEMORY = 4000
"""Sightings that a link remembers."""


class _Broken(Exception):
    """This connection ends with a reset."""


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through a link."""

    client: socket.socket
    server: socket.socket
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    exchange: Exchange = field(default_factory=Exchange)
    swallowed: bool = False
    moved: dict[Way, int] = field(default_factory=lambda: {Way.UP: 0, Way.DOWN: 0})
    sending: dict[Way, int] = field(default_factory=lambda: {Way.UP: 0, Way.DOWN: 0})
    """Handed to the system and not counted as moved yet."""
    received: dict[Way, int] = field(default_factory=lambda: {Way.UP: 0, Way.DOWN: 0})

    def carried(self, way: Way) -> int:
        """Bytes that a rule which is set now cannot hold back any more."""
        return self.moved[way] + self.sending[way]


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
        self.refused = 0
        """Connections that were not made, by order of the link or because its server is gone."""
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
                    self.refused += 1
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
            try:
                await asyncio.get_running_loop().sock_connect(server, self.target)
            except OSError:
                self.refused += 1
                raise
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
        scanner = Scanner(self.name, way, connection.exchange, parses=self._resp, marks=self.marks)
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
        in_hole = connection.exchange.replicates or not self._hole_replication_only
        if self._hole is not None and way in self._hole_ways and in_hole:
            connection.swallowed = True
            await self._hole.wait()
            raise _Broken("was half open")
        if self.delay_s:
            await anyio.sleep(self.delay_s)
        while data:
            part = data
            if self.bytes_per_s:
                part = data[: max(1, int(self.bytes_per_s * PART_S))]
                await anyio.sleep(len(part) / self.bytes_per_s)
            connection.sending[way] = len(part)
            await loop.sock_sendall(sink, part)
            connection.sending[way] = 0
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
