"""The KV data channel: exact bytes to whoever holds the ticket, nothing to anybody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from gateway.core.errors import Overloaded
from workers.engines.port import PageMeta
from workers.kv.channel import (
    HELLO,
    MAGIC,
    OFFER,
    TICKET_BYTES,
    VERSION,
    ChannelLimits,
    KvServer,
    Status,
    TransferFailed,
    pull_pages,
)

pytestmark = pytest.mark.anyio
PAGE_BYTES = 1 << 16


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@dataclass
class Export:
    """Pages held for a peer."""

    count: int = 8
    page_bytes: int = PAGE_BYTES
    released: int = 0

    @property
    def pages(self) -> Sequence[PageMeta]:
        return [PageMeta(index.to_bytes(16, "big"), index) for index in range(self.count)]

    def content(self, index: int) -> bytes:
        return index.to_bytes(4, "little") * (self.page_bytes // 4)

    def view(self, index: int) -> memoryview:
        assert not self.released, "a page was read after its export was released"
        return memoryview(self.content(index)).toreadonly()

    def release(self) -> None:
        self.released += 1


@dataclass
class Reservation:
    """Free pages reserved for incoming KV."""

    count: int = 8
    page_bytes: int = PAGE_BYTES
    buffers: list[bytearray] = field(init=False)

    def __post_init__(self) -> None:
        self.buffers = [bytearray(self.page_bytes) for _ in range(self.count)]

    @property
    def untouched(self) -> bool:
        return not any(any(buffer) for buffer in self.buffers)

    def buffer(self, index: int) -> memoryview:
        return memoryview(self.buffers[index])

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        raise AssertionError("the channel never commits")

    def release(self) -> None:
        raise AssertionError("the channel never releases a reservation")


@asynccontextmanager
async def serving(limits: ChannelLimits | None = None) -> AsyncIterator[KvServer]:
    server = KvServer("127.0.0.1", 0, limits=limits)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.serve)
        yield server
        tasks.cancel_scope.cancel()


async def pull(server: KvServer, ticket: bytes, into: Reservation, pages: int = 8) -> int:
    return await pull_pages(server.endpoint, ticket, into, pages, PAGE_BYTES, 5.0)


def connected(server: KvServer) -> socket.socket:
    host, _, port = server.endpoint.rpartition(":")
    return socket.create_connection((host, int(port)))


async def settled(export: Export) -> None:
    """Waits until the server has let go of an export."""
    with anyio.fail_after(30):
        while not export.released:
            await anyio.lowlevel.checkpoint()


async def test_every_page_arrives_and_the_export_is_released_once() -> None:
    async with serving() as server:
        export, into = Export(), Reservation()
        received = await pull(server, server.issue_ticket(export, 30), into)
        await settled(export)
    assert received == 8 * PAGE_BYTES == server.stats.bytes_sent
    assert [bytes(buffer) for buffer in into.buffers] == [export.content(i) for i in range(8)]
    assert (export.released, server.stats.completed, server.outstanding) == (1, 1, 0)


async def test_transfers_run_side_by_side() -> None:
    async with serving() as server:
        pairs = [(Export(), Reservation()) for _ in range(6)]
        async with anyio.create_task_group() as tasks:
            for export, into in pairs:
                tasks.start_soon(pull, server, server.issue_ticket(export, 30), into)
        for export, into in pairs:
            await settled(export)
            assert bytes(into.buffers[7]) == export.content(7)


@pytest.mark.parametrize("case", ["forged", "used", "expired"])
async def test_a_wrong_ticket_gets_nothing(case: str) -> None:
    async with serving() as server:
        export = Export()
        ticket = server.issue_ticket(export, 0.0 if case == "expired" else 30)
        if case == "forged":
            ticket = bytes(TICKET_BYTES)
        elif case == "used":
            await pull(server, ticket, Reservation())
            await settled(export)
        else:
            await settled(export)
        into = Reservation()
        with pytest.raises(TransferFailed, match="refused"):
            await pull(server, ticket, into)
        assert into.untouched
        assert export.released == (0 if case == "forged" else 1)
    assert export.released == 1  # a forged ticket's export: when the server closed
    assert server.stats.refused == 1


@pytest.mark.parametrize(
    "hello",
    [
        HELLO.pack(b"HTTP", VERSION, 0, b"%TICKET%" * 2),
        HELLO.pack(MAGIC, VERSION + 1, 0, b"%TICKET%" * 2),
        b"GET / HTTP/1.1\r\nhost: somewhere\r\n\r\n" + b"\0" * 65536,
    ],
    ids=["magic", "version", "garbage"],
)
async def test_a_foreign_hello_gets_no_page_and_uses_up_no_ticket(hello: bytes) -> None:
    async with serving() as server:
        export = Export()
        ticket = server.issue_ticket(export, 30)
        with connected(server) as peer:
            peer.setblocking(False)
            loop = asyncio.get_running_loop()
            answer = b""
            with suppress(ConnectionError):
                await loop.sock_sendall(peer, hello.replace(b"%TICKET%" * 2, ticket))
                while data := await loop.sock_recv(peer, 65536):
                    answer += data
        assert answer in (b"", OFFER.pack(MAGIC, VERSION, Status.REFUSED, 0, 0))
        assert (export.released, server.outstanding) == (0, 1)
        assert await pull(server, ticket, Reservation()) == 8 * PAGE_BYTES


async def test_a_target_that_stops_reading_is_cut_off_and_the_pages_are_released() -> None:
    async with serving(ChannelLimits(stall_timeout_s=0.05)) as server:
        export = Export(count=400)  # more than the sockets' buffers take
        ticket = server.issue_ticket(export, 30)
        with connected(server) as peer:
            peer.sendall(HELLO.pack(MAGIC, VERSION, 0, ticket))
            await settled(export)
    assert (export.released, server.stats.broken, server.stats.completed) == (1, 1, 0)


async def test_a_transfer_ends_with_its_lease() -> None:
    async with serving() as server:
        for lease_s in (0.1, 1.0, 4.0):
            export, before = Export(count=400), server.stats.expired
            ticket = server.issue_ticket(export, lease_s)
            with connected(server) as peer:
                peer.sendall(HELLO.pack(MAGIC, VERSION, 0, ticket))
                await settled(export)
            if server.stats.expired == before:
                break  # else the ticket had not been presented when its lease ended
    assert (export.released, server.stats.broken, server.stats.completed) == (1, 1, 0)


async def test_a_ticket_that_nobody_presents_holds_its_pages_for_moments() -> None:
    async with serving(ChannelLimits(present_timeout_s=0.05)) as server:
        export = Export()
        ticket = server.issue_ticket(export, 300)
        await settled(export)
        with pytest.raises(TransferFailed, match="refused"):
            await pull(server, ticket, Reservation())
    assert (export.released, server.stats.expired) == (1, 1)


async def test_a_silent_peer_is_cut_off() -> None:
    async with serving(ChannelLimits(hello_timeout_s=0.05)) as server:
        with connected(server) as peer:
            peer.setblocking(False)
            with anyio.fail_after(30):
                assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
    assert server.stats.broken == 1


async def test_a_target_that_goes_away_in_mid_transfer_frees_the_pages() -> None:
    async with serving() as server:
        export = Export(count=400)
        ticket = server.issue_ticket(export, 30)
        with connected(server) as peer:
            peer.sendall(HELLO.pack(MAGIC, VERSION, 0, ticket))
            peer.setblocking(False)
            assert len(await asyncio.get_running_loop().sock_recv(peer, 1)) == 1
        await settled(export)
    assert (export.released, server.stats.broken) == (1, 1)


async def test_bounds_refuse_what_exceeds_them() -> None:
    async with serving(ChannelLimits(max_tickets=2, max_connections=1)) as server:
        exports = [Export() for _ in range(3)]
        tickets = [server.issue_ticket(export, 30) for export in exports[:2]]
        with pytest.raises(Overloaded):
            server.issue_ticket(exports[2], 30)
        assert exports[2].released == 0, "a refused export stays the caller's"
        with connected(server):
            with anyio.fail_after(30):
                while not server.connections:
                    await anyio.lowlevel.checkpoint()
            with pytest.raises(OSError, match=r"closed|reset"):
                await pull(server, tickets[0], Reservation())
    assert [export.released for export in exports] == [1, 1, 0]


@asynccontextmanager
async def impostor(*chunks: bytes) -> AsyncIterator[str]:
    """A source that answers any hello with these bytes."""

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive(HELLO.size)
            for chunk in chunks:
                await stream.send(chunk)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        yield f"127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


OFFERED = OFFER.pack(MAGIC, VERSION, Status.OK, 8, PAGE_BYTES)


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ((OFFER.pack(MAGIC, VERSION, Status.OK, 2**32 - 1, PAGE_BYTES),), "announced"),
        ((OFFER.pack(MAGIC, VERSION, Status.OK, 8, 2**64 - 1),), "announced"),
        ((OFFER.pack(MAGIC, VERSION, Status.OK, 0, 0),), "announced"),
        ((OFFER.pack(b"HTTP", VERSION, Status.OK, 8, PAGE_BYTES),), "not a KV channel"),
        ((OFFER.pack(MAGIC, 9, Status.OK, 8, PAGE_BYTES),), "not a KV channel"),
        ((OFFERED[:7],), "closed after 7 of 20"),
        ((OFFERED, b"x" * (3 * PAGE_BYTES + 5)), "closed after 5 of"),
        ((OFFERED, b"x" * (8 * PAGE_BYTES + 1)), "more than"),
    ],
    ids=["pages", "bytes", "none", "magic", "version", "short-offer", "cut", "too-much"],
)
async def test_a_source_that_sends_something_else_is_an_error(
    chunks: tuple[bytes, ...], reason: str
) -> None:
    async with impostor(*chunks) as endpoint:
        with pytest.raises(TransferFailed, match=reason):
            await pull_pages(endpoint, bytes(16), Reservation(), 8, PAGE_BYTES, 5.0)


async def test_a_source_that_stalls_runs_into_the_time_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, never answers
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TimeoutError):
            await pull_pages(endpoint, bytes(16), Reservation(), 8, PAGE_BYTES, 0.05)


async def test_a_source_that_is_gone_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ConnectionRefusedError):
        await pull_pages(endpoint, bytes(16), Reservation(), 8, PAGE_BYTES, 5.0)


async def test_nothing_arrives_in_a_page_after_its_pull_was_cancelled() -> None:
    first, cut_off = anyio.Event(), anyio.Event()

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive(HELLO.size)
            await stream.send(OFFERED + b"x" * (PAGE_BYTES + 100))
            first.set()
            with suppress(anyio.BrokenResourceError):
                while True:
                    await stream.send(b"y" * PAGE_BYTES)
        cut_off.set()

    into = Reservation()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        endpoint = f"127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, answer)
            with anyio.CancelScope() as pulling:
                async with anyio.create_task_group() as pulls:
                    pulls.start_soon(pull_pages, endpoint, bytes(16), into, 8, PAGE_BYTES, 5.0)
                    await first.wait()
                    while into.buffers[1][0] == 0:
                        await anyio.lowlevel.checkpoint()
                    pulling.cancel()
            left = [bytes(buffer) for buffer in into.buffers]
            with anyio.fail_after(30):
                await cut_off.wait()
            tasks.cancel_scope.cancel()
    assert left[0] == b"x" * PAGE_BYTES
    assert [bytes(buffer) for buffer in into.buffers] == left


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http"])
async def test_an_endpoint_that_is_none_is_a_failed_transfer(endpoint: str) -> None:
    with pytest.raises(TransferFailed, match="host:port"):
        await pull_pages(endpoint, bytes(16), Reservation(), 8, PAGE_BYTES, 5.0)
