"""A hostile peer on the KV data channel: without its ticket it gets not one byte of a page, and
whatever it does, pages and connections are free again within the channel's own limits."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import anyio
import pytest
from hypothesis import given

from gateway.core.errors import Overloaded
from tests.fuzz.hostile import NASTY, Hostile, seeds
from tests.fuzz.profile import fuzz
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
    pull_pages,
)

PAGES, PAGE_BYTES = 6, 4096
LIMITS = ChannelLimits(max_tickets=4, max_connections=4, hello_timeout_s=0.15, stall_timeout_s=0.15)
PATIENT = ChannelLimits(
    max_tickets=4, max_connections=4, hello_timeout_s=30.0, stall_timeout_s=30.0
)
"""Where nobody keeps the channel waiting: a peer that this process was too slow for is no hostile
one."""
REFUSED = OFFER.pack(MAGIC, VERSION, Status.REFUSED, 0, 0)
OFFERED = OFFER.pack(MAGIC, VERSION, Status.OK, PAGES, PAGE_BYTES)


@dataclass
class Export:
    """Pages held for a peer; their content is recognisable."""

    count: int = PAGES
    released: int = 0

    @property
    def pages(self) -> Sequence[PageMeta]:
        return [PageMeta(index.to_bytes(16, "big"), index) for index in range(self.count)]

    def view(self, index: int) -> memoryview:
        assert not self.released, "a page was read after its export was released"
        return memoryview(bytes([(index + 1) % 256]) * PAGE_BYTES).toreadonly()

    def release(self) -> None:
        self.released += 1


@dataclass
class Reservation:
    """Room for incoming pages, between two guards that nothing may write to."""

    memory: bytearray = field(default_factory=lambda: bytearray((PAGES + 2) * PAGE_BYTES))

    def buffer(self, index: int) -> memoryview:
        assert 0 <= index < PAGES
        return memoryview(self.memory)[(index + 1) * PAGE_BYTES : (index + 2) * PAGE_BYTES]

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        raise AssertionError("the channel never commits")

    def release(self) -> None:
        raise AssertionError("the channel never releases a reservation")

    @property
    def intact(self) -> bool:
        return not any(self.memory[:PAGE_BYTES]) and not any(self.memory[-PAGE_BYTES:])


@asynccontextmanager
async def serving(limits: ChannelLimits = LIMITS) -> AsyncIterator[KvServer]:
    server = KvServer("127.0.0.1", 0, limits=limits)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.serve)
        yield server
        tasks.cancel_scope.cancel()


async def said_to(server: KvServer, chunks: Sequence[bytes], linger_s: float) -> bytes:
    """Everything that the server answers to these bytes. The peer then stays for a while."""
    host, _, port = server.endpoint.rpartition(":")
    heard = b""
    stream = await anyio.connect_tcp(host, int(port))
    async with stream:
        try:
            for chunk in chunks:
                await stream.send(chunk)
            with anyio.move_on_after(linger_s):
                while True:
                    heard += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
    return heard


def hellos(draw: random.Random, tickets: Sequence[bytes]) -> list[bytes]:
    """What an impostor says: it does not know a ticket, but may know much of one."""
    ticket = bytearray(draw.choice(tickets))
    match draw.randrange(4):
        case 0:
            ticket[draw.randrange(TICKET_BYTES)] ^= draw.randrange(1, 256)
        case 1:
            ticket = bytearray(draw.randbytes(TICKET_BYTES))
        case 2:
            ticket = bytearray(TICKET_BYTES)
        case _:
            ticket = ticket[1:] + ticket[:1]
    if bytes(ticket) in tickets:
        ticket[0] ^= 1
        ticket[1] ^= 1
    hello = HELLO.pack(
        draw.choice((MAGIC, MAGIC, b"HTTP")),
        draw.choice((VERSION, VERSION, 0, 65535)),
        draw.choice((0, 1, 65535)),
        bytes(ticket),
    )
    data = draw.choice(
        (
            hello,
            hello[: draw.randrange(len(hello))],
            hello * draw.randrange(1, 50),
            draw.randbytes(draw.randrange(200)),
            hello + draw.randbytes(100_000),
        )
    )
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(4)))
    return [
        data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if data
    ]


async def _impostors(seed: int) -> None:
    draw = random.Random(seed)
    async with serving() as server:
        exports = [Export() for _ in range(3)]
        tickets = [server.issue_ticket(export, 30) for export in exports]
        answers: list[bytes] = []

        async def attack() -> None:
            linger_s = draw.choice((0.0, 0.02, 0.4))
            answers.append(await said_to(server, hellos(draw, tickets), linger_s))

        async with anyio.create_task_group() as tasks:
            for _ in range(draw.randrange(1, 12)):
                tasks.start_soon(attack)
        assert set(answers) <= {b"", REFUSED}
        assert [export.released for export in exports] == [0, 0, 0], "no ticket was used up"
        assert server.stats.bytes_sent == 0
        await free(server)
        into = Reservation()
        pulled = await pull_pages(server.endpoint, tickets[0], into, PAGES, PAGE_BYTES, 5.0)
        assert pulled == PAGES * PAGE_BYTES
        assert into.intact
    assert [export.released for export in exports] == [1, 1, 1]


async def free(server: KvServer) -> None:
    """Waits for what the channel promises: peers that keep it waiting are cut off."""
    with anyio.fail_after(10 * (LIMITS.hello_timeout_s + LIMITS.stall_timeout_s)):
        while server.connections:  # noqa: ASYNC110 - no signal comes
            await anyio.sleep(0.01)


@fuzz(12)
@given(seeds)
def test_impostors_get_no_byte_and_hold_no_connection(seed: int) -> None:
    anyio.run(_impostors, seed)


async def _thieves(seed: int) -> None:
    """A ticket presented many times at once is worth its pages once."""
    draw = random.Random(seed)
    async with serving(PATIENT) as server:
        export = Export()
        hello = HELLO.pack(MAGIC, VERSION, 0, server.issue_ticket(export, 30))
        answers: list[bytes] = []

        async def present() -> None:
            cut = draw.randrange(1, HELLO.size)
            answers.append(await said_to(server, [hello[:cut], hello[cut:]], 20.0))

        async with anyio.create_task_group() as tasks:
            for _ in range(LIMITS.max_connections):
                tasks.start_soon(present)
        whole = OFFERED + b"".join(bytes(export_page(index)) for index in range(PAGES))
        assert sorted(answers, key=len)[-1] == whole
        assert answers.count(whole) == 1
        assert set(answers) <= {b"", REFUSED, whole}
        await free(server)
    assert export.released == 1


def export_page(index: int) -> memoryview:
    return Export().view(index)


@fuzz(8)
@given(seeds)
def test_a_ticket_is_worth_its_pages_once(seed: int) -> None:
    anyio.run(_thieves, seed)


async def _hoarders() -> None:
    """Peers that connect and say nothing, or take a ticket's pages and read nothing."""
    async with serving(replace(LIMITS, present_timeout_s=30.0)) as server:
        big = Export(count=4000)
        hello = HELLO.pack(MAGIC, VERSION, 0, server.issue_ticket(big, 30))
        most = 0

        async def hoard(say: bytes) -> None:
            host, _, port = server.endpoint.rpartition(":")
            peer = socket.socket()
            peer.setblocking(False)
            loop = asyncio.get_running_loop()
            try:
                with anyio.move_on_after(3):
                    await loop.sock_connect(peer, (host, int(port)))
                    await loop.sock_sendall(peer, say)
                    await anyio.sleep(3)
            except OSError:
                pass
            finally:
                peer.close()

        async with anyio.create_task_group() as tasks:
            while server.outstanding:  # it may be cut off before it has said what it has to say
                tasks.start_soon(hoard, hello)
                await anyio.sleep(0.1)
            for _ in range(30):
                tasks.start_soon(hoard, b"")
            with anyio.move_on_after(1.0):
                while True:
                    most = max(most, server.connections)
                    await anyio.sleep(0.005)
            await free(server)
            assert big.released == 1
            tasks.cancel_scope.cancel()
        assert 1 <= most <= LIMITS.max_connections
        for _ in range(LIMITS.max_tickets):
            server.issue_ticket(Export(), 30)
        refused = Export()
        with pytest.raises(Overloaded) as overloaded:
            server.issue_ticket(refused, 30)
        assert overloaded.value.retry_after_ms
        assert refused.released == 0, "a refused export stays the caller's"


def test_hoarders_hold_nothing_past_the_bounds() -> None:
    anyio.run(_hoarders)


# -- a hostile source ------------------------------------------------------------------------------


def answer(hostile: Hostile) -> list[bytes]:
    """Too little, too much, other bytes; or right ones, in odd pieces."""
    draw = hostile.draw
    pages = draw.randbytes(PAGES * PAGE_BYTES)
    data = draw.choice(
        (
            OFFERED + pages,
            OFFERED + pages + b"x" * draw.choice((1, 100_000)),
            (OFFERED + pages)[: draw.randrange(len(pages))],
            OFFERED[: draw.randrange(OFFER.size)],
            OFFER.pack(
                draw.choice((MAGIC, b"XXXX")),
                draw.choice((VERSION, 2)),
                draw.choice((0, 1, 9)),
                draw.choice((PAGES, 0, 2**32 - 1)),
                draw.choice((PAGE_BYTES, 0, 2**64 - 1)),
            )
            + pages,
            hostile.damage(OFFERED + pages[:100]),
            draw.randbytes(300),
            b"",
        )
    )
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(5)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@asynccontextmanager
async def impostor(chunks: Sequence[bytes], linger_s: float) -> AsyncIterator[str]:
    async def respond(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            try:
                for chunk in chunks:
                    await stream.send(chunk)
                await anyio.sleep(linger_s)
            except anyio.BrokenResourceError:
                pass

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, respond)
        yield f"127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


async def _source(seed: int) -> None:
    hostile = Hostile(seed)
    chunks, into = answer(hostile), Reservation()
    async with impostor(chunks, hostile.draw.choice((0.0, 0.3))) as endpoint:
        try:
            received = await pull_pages(endpoint, bytes(16), into, PAGES, PAGE_BYTES, 0.15)
        except (OSError, TimeoutError):
            received = 0
        before = bytes(into.memory)
        assert into.intact
        await anyio.sleep(0.01)
        assert bytes(into.memory) == before, "written to after the pull had ended"
    if received:
        assert b"".join(chunks) == OFFERED + before[PAGE_BYTES:-PAGE_BYTES]


@fuzz(30)
@given(seeds)
def test_a_hostile_source_is_an_error_and_writes_to_no_other_memory(seed: int) -> None:
    anyio.run(_source, seed)


NOT_CONNECTABLE = (
    "127.0.0.1:99999",
    "9" * 400,
    "a" * 300 + ":1",
    "a\0b:1",
    "127.0.0.1:" + "9" * 5000,
    "..:1",
)
ENDPOINTS = [
    *sorted({*NASTY, "h:٣", "127.0.0.1:0", ":1", "[::"} - {*NOT_CONNECTABLE}),
    *NOT_CONNECTABLE,
]


async def _endpoint(endpoint: str) -> Exception | None:
    try:
        await pull_pages(endpoint, bytes(16), Reservation(), PAGES, PAGE_BYTES, 1.0)
    except Exception as error:  # noqa: BLE001 - judged by the caller
        return error
    return None


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=map(str, range(len(ENDPOINTS))))
def test_a_hostile_endpoint_is_a_connection_error(endpoint: str) -> None:
    """A source names its own: whatever that is, a pull may fail only as its port says."""
    error = anyio.run(_endpoint, endpoint)
    assert isinstance(error, OSError | TimeoutError), repr(error)
