"""The KV data channel over TLS: the same bytes, for parts of the same fleet only."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from gateway.security.tls import Tls
from tests.support.certificates import HOST, Authority
from tests.unit.test_kv_channel import PAGE_BYTES, Export, Reservation
from workers.kv.channel import ChannelLimits, KvServer, TransferFailed, pull_pages

pytestmark = pytest.mark.anyio

REFUSED = (TransferFailed, ConnectionError, ssl.SSLError)
"""By either side, in or after the handshake."""


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
def fleet(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "fleet")


@asynccontextmanager
async def serving(tls: Tls | None, limits: ChannelLimits | None = None) -> AsyncIterator[KvServer]:
    server = KvServer(HOST, 0, limits=limits, tls=tls)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.serve)
        yield server
        tasks.cancel_scope.cancel()


async def pull(endpoint: str, ticket: bytes, into: Reservation, pages: int, tls: Tls | None) -> int:
    return await pull_pages(endpoint, ticket, into, pages, into.page_bytes, 5.0, tls=tls)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - the server tells nobody
            await anyio.sleep(0.001)


@pytest.mark.parametrize(("pages", "page_bytes"), [(1, 64), (40, PAGE_BYTES), (3, 5 << 20)])
async def test_pages_arrive_as_they_were_sent(
    fleet: Authority, pages: int, page_bytes: int
) -> None:
    async with serving(fleet.tls("source")) as server:
        export, into = Export(pages, page_bytes), Reservation(pages, page_bytes)
        ticket = server.issue_ticket(export, 10.0)
        assert server.endpoint.startswith(f"tls://{HOST}:")
        received = await pull(server.endpoint, ticket, into, pages, fleet.tls("target"))
        assert received == pages * page_bytes
        assert [bytes(buffer) for buffer in into.buffers] == [
            export.content(index) for index in range(pages)
        ]
        await until(lambda: server.connections == 0)
        assert (server.stats.completed, export.released) == (1, 1)


async def test_a_wrong_ticket_gets_nothing_whatever_the_certificate(fleet: Authority) -> None:
    async with serving(fleet.tls("source")) as server:
        server.issue_ticket(Export(), 10.0)
        into = Reservation()
        with pytest.raises(TransferFailed, match="ticket"):
            await pull(server.endpoint, bytes(16), into, 8, fleet.tls("target"))
        assert into.untouched


async def test_who_has_no_certificate_of_the_fleet_gets_nothing(
    fleet: Authority, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "foreign")
    stranger = Tls(foreign.issue("stranger", ca=fleet.certificate))
    async with serving(fleet.tls("source")) as server:
        export, into = Export(), Reservation()
        ticket = server.issue_ticket(export, 10.0)
        with pytest.raises(REFUSED):
            await pull(server.endpoint, ticket, into, 8, stranger)
        await until(lambda: server.stats.broken == 1)
        assert into.untouched
        assert server.outstanding == 1, "the ticket was never presented"


async def test_a_source_that_is_not_of_the_fleet_is_told_no_ticket(
    fleet: Authority, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "foreign")
    impostor = Tls(foreign.issue("impostor", ca=fleet.certificate))
    async with serving(impostor) as server:
        ticket = server.issue_ticket(Export(), 10.0)
        with pytest.raises(REFUSED):
            await pull(server.endpoint, ticket, Reservation(), 8, fleet.tls("target"))
        assert server.outstanding == 1


async def test_a_certificate_for_another_host_is_refused_unless_its_name_is_expected(
    fleet: Authority,
) -> None:
    async with serving(fleet.tls("source", "kv.fleet.internal")) as server:
        export, into = Export(), Reservation()
        ticket = server.issue_ticket(export, 10.0)
        target = fleet.tls("target")
        with pytest.raises(REFUSED):
            await pull(server.endpoint, ticket, into, 8, target)
        named = Tls(replace(target.config, peer_name="kv.fleet.internal"))
        assert await pull(server.endpoint, ticket, into, 8, named)


async def test_plain_text_is_refused_by_tls_and_tls_by_plain_text(fleet: Authority) -> None:
    async with serving(fleet.tls("source"), ChannelLimits(hello_timeout_s=0.3)) as server:
        ticket = server.issue_ticket(Export(), 10.0)
        with pytest.raises(REFUSED):
            await pull(server.endpoint.removeprefix("tls://"), ticket, Reservation(), 8, None)
        assert server.outstanding == 1
    async with serving(None) as server:
        ticket = server.issue_ticket(Export(), 10.0)
        with pytest.raises(REFUSED):
            await pull("tls://" + server.endpoint, ticket, Reservation(), 8, fleet.tls("target"))
        assert server.outstanding == 1


async def test_a_peer_that_never_speaks_is_cut_off(fleet: Authority) -> None:
    async with serving(fleet.tls("source"), ChannelLimits(hello_timeout_s=0.05)) as server:
        port = int(server.endpoint.rpartition(":")[2])
        async with await anyio.connect_tcp(HOST, port) as stream:
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        await until(lambda: server.connections == 0)


async def test_a_peer_that_stops_reading_is_cut_off(fleet: Authority) -> None:
    limits = ChannelLimits(stall_timeout_s=0.1)
    async with serving(fleet.tls("source"), limits) as server:
        export = Export(4, 16 << 20)
        ticket = server.issue_ticket(export, 10.0)
        port = int(server.endpoint.rpartition(":")[2])
        hello = b"SeKV" + (1).to_bytes(2, "big") + bytes(2) + ticket
        context = fleet.tls("target").calling()
        async with await anyio.connect_tcp(
            HOST, port, ssl_context=context, tls_hostname=HOST, tls_standard_compatible=False
        ) as it:
            await it.send(hello)
            await until(lambda: export.released == 1)
        assert server.stats.broken == 1


async def test_a_renewed_certificate_serves_the_next_transfer(fleet: Authority) -> None:
    source = fleet.tls("source")
    async with serving(source) as server:
        target = fleet.tls("target")
        assert await pull(
            server.endpoint, server.issue_ticket(Export(), 9.0), Reservation(), 8, target
        )
        fleet.issue("source", "elsewhere")
        with pytest.raises(REFUSED, match=HOST):
            await pull(
                server.endpoint, server.issue_ticket(Export(), 9.0), Reservation(), 8, target
            )
        fleet.issue("source")
        assert await pull(
            server.endpoint, server.issue_ticket(Export(), 9.0), Reservation(), 8, target
        )
    assert source.generation == 2


async def test_plain_pages_are_not_pulled_from_another_machine() -> None:
    with pytest.raises(TransferFailed, match="not on loopback"):
        await pull("192.0.2.1:9", bytes(16), Reservation(), 8, None)
