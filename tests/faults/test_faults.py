"""A few faults of each cheap kind on real processes; ``make faults`` plays them all."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import pytest

from statestore import keys
from tests.faults.agents import Agent
from tests.faults.breakpoints import Breakpoint, Verdict, Way
from tests.faults.catalogue import CLASSES, FLEETS
from tests.faults.fleet import Fleet, fleet
from tests.faults.proxy import Proxy
from tests.faults.rounds import FaultClass, Round, play
from tests.faults.servers import SingleStore
from tests.faults.verdict import undisturbed

CHEAP = (
    "worker-prefill-kill",
    "worker-decode-kill",
    "worker-group-commit-kill",
    "worker-commit-kill",
    "worker-kv-export-kill",
    "worker-kv-import-kill",
    "worker-group-commit-stop",
    "gateway-open-kill",
    "gateway-relay-kill",
    "gateway-failover-kill",
    "gateway-worker-cut",
    "worker-redis-cut",
    "client-vanished",
    "redis-memory-limit",
    "redis-power-cut-everysec",
    "both-redis-restart-worker-kill",
    "both-worker-kill-next-worker-kill",
)

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def running(anyio_backend: str) -> AsyncIterator[Fleet]:
    async with fleet(SingleStore("everysec"), patient=True) as made:
        yield made


@pytest.mark.parametrize("name", CHEAP)
async def test_a_fault_costs_no_token_no_turn_and_no_session(running: Fleet, name: str) -> None:
    cls = next(c for c in CLASSES if c.name == name)
    outcome = await play(running, cls, 0, "pytest")
    told = "\n".join([outcome.unproven, *outcome.proofs, *outcome.tally.violations])
    assert not outcome.failed, told
    assert (outcome.tally.lost, outcome.tally.repeated) == (0, 0), told


async def test_a_ledger_that_says_otherwise_than_undisturbed_turns_is_noticed(
    running: Fleet,
) -> None:
    endpoints = {n.name: running.proxy.links[f"client:{n.name}"].endpoint for n in running.gateways}
    agent = Agent("twice", endpoints, random.Random(0))
    await agent.open()
    for _ in range(2):
        await agent.turn(tokens=20)
    assert await undisturbed(running, [agent]) == []
    ledger = keys.ledger_key(agent.session_id)
    last = await running.raw.getrange(ledger, -4, -1)
    await running.raw.setrange(ledger, await running.raw.strlen(ledger) - 4, last[::-1])
    (complaint,) = await undisturbed(running, [agent])
    assert "undisturbed it says otherwise" in complaint
    await agent.close()
    await agent.aclose()


async def test_a_worker_that_the_kernel_kills_is_a_violation(running: Fleet) -> None:
    cls = FaultClass("nothing", _kill_behind_its_back)
    outcome = await play(running, cls, 0, "pytest")
    said = [what for what in outcome.tally.violations if "ended by itself with -9" in what]
    assert len(said) == len(outcome.tally.violations) == 1, outcome.tally.violations


async def _kill_behind_its_back(round_: Round) -> None:
    os.kill((await round_.owner(round_.focus)).process.pid, signal.SIGKILL)
    round_.start_focus(tokens=30)
    await round_.focus_done.wait()


async def test_the_catalogue_has_every_class_once() -> None:
    names = [cls.name for cls in CLASSES]
    assert len(names) == len(set(names))
    assert {cls.store for cls in CLASSES} == set(FLEETS)


# -- the proxy itself --------------------------------------------------------------------------


async def _echo(stream: anyio.abc.SocketStream) -> None:
    with suppress(anyio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send(data)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """One link before a server that sends everything back."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, _echo)
        made = Proxy(tasks)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        made.add("echo", ("127.0.0.1", 0), ("127.0.0.1", port))
        yield made
        tasks.cancel_scope.cancel()


async def test_a_breakpoint_holds_the_bytes_after_its_place(proxy: Proxy) -> None:
    link = proxy.links["echo"]
    point = Breakpoint(Way.DOWN, lambda s: s.offset == 3, at_byte=3)
    link.arm(point)
    async with await anyio.connect_tcp(*link.address) as client:
        await client.send(b"abcdef")
        await point.hit.wait()
        assert await client.receive() == b"abc"
        assert link.passed[Way.DOWN] == 3
        point.decide(Verdict.PASS)
        assert await client.receive() == b"def"


async def test_what_a_breakpoint_drops_is_lost_with_its_connection(proxy: Proxy) -> None:
    link = proxy.links["echo"]
    point = Breakpoint(Way.UP, lambda s: s.offset == 0, at_byte=0)
    link.arm(point)
    async with await anyio.connect_tcp(*link.address) as client:
        await client.send(b"abc")
        await point.hit.wait()
        point.decide(Verdict.DROP)
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
    assert link.passed[Way.UP] == 0


async def test_a_cut_link_resets_old_and_new_connections_until_it_is_healed(proxy: Proxy) -> None:
    link = proxy.links["echo"]
    async with await anyio.connect_tcp(*link.address) as client:
        await client.send(b"abc")
        assert await client.receive() == b"abc"
        link.cut()
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
    async with await anyio.connect_tcp(*link.address) as client:
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
    link.heal()
    async with await anyio.connect_tcp(*link.address) as client:
        await client.send(b"again")
        assert await client.receive() == b"again"


async def test_nothing_passes_a_half_open_link_and_nobody_is_told(proxy: Proxy) -> None:
    link = proxy.links["echo"]
    async with await anyio.connect_tcp(*link.address) as client:
        await client.send(b"abc")
        assert await client.receive() == b"abc"
        link.half_open()
        await client.send(b"lost")
        with anyio.move_on_after(0.1) as silence:
            await client.receive()
        assert silence.cancelled_caught
        link.heal()
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
