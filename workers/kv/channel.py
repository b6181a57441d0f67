"""The data channel of KV transfer: pages go from the source's memory to the target's over TCP.

gRPC copies a message several times and tops out at a fraction of what loopback carries, so pages
travel beside it, on a port of their own. The control call (ExportKv) hands the target a one-time
ticket; whoever presents it soon gets exactly the pages it stands for, once, before its lease ends.

    target → source   hello   magic, version, ticket                      24 bytes
    source → target   offer   magic, version, status, pages, page_bytes   20 bytes
                      pages, back to back, then end of stream

The source sends from the export's own memory on a plain non-blocking socket, the target receives
into the engine's reserved pages by a ``BufferedProtocol``, nothing is copied in between. What
arrives is not trusted: the engine's ``commit`` verifies each page's checksum. The channel's own
check is that exactly the announced bytes came.

With TLS (1.3, certificates on both sides) the same is said inside it. The ticket stays what
entitles to pages: a certificate only says that the peer is a part of this fleet.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import re
import secrets
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import anyio
import anyio.abc
import anyio.lowlevel

from gateway.core.errors import Overloaded
from gateway.security.tls import InsecureEndpoint, Tls, dialled, endpoint_of
from workers.config import join_address
from workers.engines.port import PageExport, PageImport
from workers.kv.tls_socket import connected, say_farewell, unblocked

log = logging.getLogger(__name__)

MAGIC = b"SeKV"
VERSION = 1
TICKET_BYTES = 16
HELLO = struct.Struct("!4sHH16s")
OFFER = struct.Struct("!4sHHIQ")
LISTEN_BACKLOG = 16
ACCEPT_RETRY_S = 0.1
YIELD_BYTES = 1 << 20
"""A socket that never blocks would keep the event loop to itself; others run after this much."""


class TransferFailed(ConnectionError):
    """The peer refused, broke off, or sent something else than announced."""


class Status(enum.IntEnum):
    """The source's answer to a ticket."""

    OK = 0
    REFUSED = 1
    """Unknown, used or expired; the source does not say which."""


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    """Bounds of one server. At ``max_tickets`` a ticket is refused as Overloaded, at
    ``max_connections`` a new connection is closed unheard; a peer that keeps the channel waiting
    for longer than a timeout is cut off."""

    max_tickets: int = 64
    max_connections: int = 16
    present_timeout_s: float = 5.0
    """A ticket that was not presented by then is void, whatever its lease."""
    hello_timeout_s: float = 5.0
    stall_timeout_s: float = 5.0
    """Limit for each page to leave."""


@dataclass(slots=True)
class ChannelStats:
    """Counters since start."""

    completed: int = 0
    refused: int = 0
    broken: int = 0
    expired: int = 0
    bytes_sent: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Issued:
    """What an outstanding ticket stands for."""

    export: PageExport
    deadline: float
    """On the event loop's clock."""
    expiry: asyncio.TimerHandle


class KvServer:
    """The source's end. Binds at once (port 0: any free one), serves while :meth:`serve` runs.

    Every export given to :meth:`issue_ticket` is released here: after its transfer, whether that
    succeeded or not, at its lease's end, or when the server closes.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        advertised_host: str = "",
        limits: ChannelLimits | None = None,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        tls: Tls | None = None,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
        self._listener.setblocking(False)
        self._host = advertised_host or host
        self._port: int = self._listener.getsockname()[1]
        self._limits = limits or ChannelLimits()
        self._random_bytes = random_bytes
        self._tls = tls
        self._issued: dict[bytes, _Issued] = {}
        """By ticket. The table's keyed hash keeps a near miss from telling by its time."""
        self._connections: set[socket.socket] = set()
        self._closed = False
        self.stats = ChannelStats()

    @property
    def endpoint(self) -> str:
        """For peers: host:port, with ``tls://`` before it where TLS is spoken."""
        return endpoint_of(join_address(self._host, self._port), self._tls)

    @property
    def outstanding(self) -> int:
        """Tickets that were neither presented nor expired."""
        return len(self._issued)

    @property
    def connections(self) -> int:
        """Peers connected now."""
        return len(self._connections)

    def issue_ticket(self, export: PageExport, lease_s: float) -> bytes:
        """A one-time secret for these pages; from here on the server owns the export. Raises
        Overloaded at the bound of outstanding tickets (the export then stays the caller's)."""
        if self._closed or len(self._issued) >= self._limits.max_tickets:
            raise Overloaded(
                f"{len(self._issued)} KV exports wait for their peers",
                retry_after_ms=round(self._limits.present_timeout_s * 1000),
            )
        loop = asyncio.get_running_loop()
        ticket = self._random_bytes(TICKET_BYTES)
        deadline = loop.time() + lease_s
        void_at = min(deadline, loop.time() + self._limits.present_timeout_s)
        expiry = loop.call_at(void_at, self._expire, ticket)
        self._issued[ticket] = _Issued(export, deadline, expiry)
        return ticket

    async def serve(
        self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until cancelled, then closes."""
        try:
            async with anyio.create_task_group() as connections:
                task_status.started()
                while True:
                    connection = await self._accept()
                    if len(self._connections) >= self._limits.max_connections:
                        self.stats.refused += 1
                        connection.close()
                        continue
                    self._connections.add(connection)
                    connections.start_soon(self._serve_connection, connection)
        finally:
            self.close()

    def close(self) -> None:
        """Stops listening, cuts connections, releases every outstanding export. Idempotent."""
        self._closed = True
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        for issued in self._issued.values():
            issued.expiry.cancel()
            issued.export.release()
        self._issued.clear()

    async def _accept(self) -> socket.socket:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError as error:  # out of descriptors, or the peer has already gone
                log.warning("kv channel: cannot accept: %s", error)
                await anyio.sleep(ACCEPT_RETRY_S)
            else:
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection

    async def _serve_connection(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = await self._secured(connection, self._tls)
            issued = self._redeem(await self._receive_hello(connection))
            if issued is None:
                self.stats.refused += 1
                await self._send(connection, OFFER.pack(MAGIC, VERSION, Status.REFUSED, 0, 0))
            else:
                await self._send_pages(connection, issued)
        except OSError as error:  # TimeoutError is one
            self.stats.broken += 1
            log.info("kv channel: transfer broke: %s: %s", type(error).__name__, error)
        finally:
            self._connections.discard(connection)
            connection.close()

    async def _secured(self, plain: socket.socket, tls: Tls) -> ssl.SSLSocket:
        """The same connection, in the table too, after TLS was agreed on. It is written to directly
        from the export's memory; asyncio's TLS would copy everything once more."""
        connection = tls.serving().wrap_socket(
            plain, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        self._connections.discard(plain)  # it is empty now: its descriptor went with the wrapping
        self._connections.add(connection)
        try:
            with anyio.fail_after(self._limits.hello_timeout_s):
                await unblocked(connection, connection.do_handshake)
        except BaseException:
            self._connections.discard(connection)
            connection.close()
            raise
        return connection

    async def _receive_hello(self, connection: socket.socket) -> bytes:
        hello = b""
        with anyio.fail_after(self._limits.hello_timeout_s):
            while missing := HELLO.size - len(hello):
                if isinstance(connection, ssl.SSLSocket):
                    data = await unblocked(connection, partial(connection.recv, missing))
                else:
                    data = await asyncio.get_running_loop().sock_recv(connection, missing)
                if not data:
                    raise TransferFailed(f"the peer closed after {len(hello)} bytes of its hello")
                hello += data
        return hello

    def _redeem(self, hello: bytes) -> _Issued | None:
        """The export that a hello is entitled to; its ticket is used up."""
        magic, version, _, presented = HELLO.unpack(hello)
        if magic != MAGIC or version != VERSION:
            return None
        issued = self._issued.pop(presented, None)
        if issued is not None:
            issued.expiry.cancel()
        return issued

    async def _send_pages(self, connection: socket.socket, issued: _Issued) -> None:
        export = issued.export
        try:
            with anyio.CancelScope(deadline=issued.deadline) as lease:
                count = len(export.pages)
                page_bytes = export.view(0).nbytes if count else 0
                await self._send(
                    connection, OFFER.pack(MAGIC, VERSION, Status.OK, count, page_bytes)
                )
                unyielded = 0
                for index in range(count):
                    await self._send(connection, export.view(index))
                    self.stats.bytes_sent += page_bytes
                    unyielded += page_bytes
                    if unyielded >= YIELD_BYTES:
                        unyielded = 0
                        await anyio.lowlevel.checkpoint()
                await self._end(connection)
                self.stats.completed += 1
            if lease.cancelled_caught:
                raise TimeoutError("the export's lease ended")
        finally:
            export.release()

    async def _send(self, connection: socket.socket, data: bytes | memoryview) -> None:
        with anyio.fail_after(self._limits.stall_timeout_s):
            if not isinstance(connection, ssl.SSLSocket):
                await asyncio.get_running_loop().sock_sendall(connection, data)
                return
            rest = memoryview(data)
            while rest:
                sent = await unblocked(connection, partial(connection.send, rest))
                rest = rest[sent:]

    async def _end(self, connection: socket.socket) -> None:
        """Says that nothing more comes."""
        if isinstance(connection, ssl.SSLSocket):
            with anyio.fail_after(self._limits.stall_timeout_s):
                # The peer's own farewell is not waited for: it has nothing to say.
                await unblocked(connection, partial(say_farewell, connection))
        connection.shutdown(socket.SHUT_WR)

    def _expire(self, ticket: bytes) -> None:
        self.stats.expired += 1
        self._issued.pop(ticket).export.release()


async def pull_pages(
    endpoint: str,
    ticket: bytes,
    reservation: PageImport,
    pages: int,
    page_bytes: int,
    timeout_s: float,
    *,
    tls: Tls | None = None,
    allow_insecure: bool = False,
) -> int:
    """Receives ``pages`` pages into the reservation's buffers, from index 0; returns the bytes.

    Neither commits nor releases the reservation; once this returns or raises, nothing is written to
    it any more. Raises TransferFailed or another OSError if the source refuses, breaks off or
    announces other sizes, and TimeoutError after ``timeout_s``. ``tls``: this side's certificate,
    for endpoints that speak TLS; others off loopback are refused unless ``allow_insecure``.
    """
    if re.fullmatch(r"(tls://)?.+:[0-9]+", endpoint) is None:
        raise TransferFailed(f"{endpoint[:128]!r} is not host:port")
    try:
        address, tls = dialled(endpoint, tls, allow_insecure=allow_insecure)
    except InsecureEndpoint as error:
        raise TransferFailed(str(error)) from error
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    receiver = _PageReceiver(ticket, reservation, pages, page_bytes)
    try:
        with anyio.fail_after(timeout_s):
            try:
                if tls is not None:
                    await _receive_by_tls(receiver, host, int(port), tls)
                else:
                    await asyncio.get_running_loop().create_connection(
                        lambda: receiver, host, int(port)
                    )
            except (ValueError, OverflowError) as error:
                raise TransferFailed(f"{endpoint[:128]!r} cannot be connected to") from error
            await receiver.ended.wait()
    finally:
        receiver.close()
    if receiver.failure is not None:
        raise receiver.failure
    return pages * page_bytes


async def _receive_by_tls(receiver: _PageReceiver, host: str, port: int, tls: Tls) -> None:
    """What the event loop does for a receiver, on a socket of its own. Raises OSError."""
    connection = tls.calling().wrap_socket(
        await connected(host, port),
        server_hostname=tls.config.peer_name or host,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=False,
    )
    try:
        await unblocked(connection, connection.do_handshake)
        await unblocked(connection, partial(connection.send, receiver.hello))
        unyielded = 0
        while not receiver.ended.is_set():
            # A buffer is asked for anew each time: none is there to write to after a close.
            count = await unblocked(
                connection, lambda: connection.recv_into(receiver.get_buffer(-1))
            )
            if count:
                receiver.buffer_updated(count)
            else:
                receiver.eof_received()
            unyielded += count
            if unyielded >= YIELD_BYTES:
                unyielded = 0
                await anyio.lowlevel.checkpoint()
    finally:
        connection.close()


class _PageReceiver(asyncio.BufferedProtocol):
    """Presents the ticket and has the event loop receive the offer, then page after page straight
    into the reservation's buffers. ``ended`` is set when the stream ended as it should, or after a
    ``failure``.

    The event loop asks for a buffer and fills it in one go, so a page is written to only while this
    is open: :meth:`close` ends the reading, and there is no page to be had after it.
    """

    def __init__(self, ticket: bytes, reservation: PageImport, pages: int, page_bytes: int) -> None:
        self.ended = anyio.Event()
        self.failure: Exception | None = None
        self.hello = HELLO.pack(MAGIC, VERSION, 0, ticket)
        self._reservation = reservation
        self._pages = pages
        self._page_bytes = page_bytes
        self._transport: asyncio.WriteTransport | None = None
        self._next_page = 0
        self._offer = self._part = self._rest = memoryview(bytearray(OFFER.size))
        """``_part`` is being received: the offer, then a page; ``_rest`` is missing of it. Both are
        empty after the last page."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.write(self.hello)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._rest or memoryview(bytearray(1))

    def buffer_updated(self, nbytes: int) -> None:
        if self.ended.is_set():
            return
        if not self._rest:
            self._end(TransferFailed(f"more than the {self._pages} announced pages came"))
            return
        self._rest = self._rest[nbytes:]
        if not self._rest:
            try:
                self._begin_next_part()
            except Exception as error:  # noqa: BLE001 - whatever it is, pull_pages raises it
                self._end(error)

    def eof_received(self) -> None:
        done, size = len(self._part) - len(self._rest), len(self._part)
        early = TransferFailed(f"the peer closed after {done} of {size} bytes")
        self._end(early if self._part else None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or TransferFailed("the connection was closed"))

    def close(self) -> None:
        """Receives nothing more."""
        self._part = self._rest = self._offer[:0]
        if self._transport is not None:
            self._transport.abort()

    def _begin_next_part(self) -> None:
        if self._part is self._offer:
            _check_offer(self._offer, self._pages, self._page_bytes)
        if self._next_page == self._pages:
            self._part = self._rest
            return
        buffer = self._reservation.buffer(self._next_page)
        if buffer.nbytes != self._page_bytes:
            raise ValueError(
                f"page {self._next_page} has {buffer.nbytes} bytes, not {self._page_bytes}"
            )
        self._part = self._rest = buffer
        self._next_page += 1

    def _end(self, failure: Exception | None) -> None:
        if not self.ended.is_set():
            self.failure = failure
            self.ended.set()


def _check_offer(offer: memoryview, pages: int, page_bytes: int) -> None:
    magic, version, status, offered_pages, offered_bytes = OFFER.unpack(offer)
    if magic != MAGIC or version != VERSION:
        raise TransferFailed(f"not a KV channel of version {VERSION}")
    if status != Status.OK:
        raise TransferFailed("the ticket was refused (unknown, used or expired)")
    if (offered_pages, offered_bytes) != (pages, page_bytes):
        raise TransferFailed(
            f"announced {offered_pages} pages of {offered_bytes} bytes, "
            f"expected {pages} of {page_bytes}"
        )
