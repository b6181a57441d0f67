"""One tenant asks for everything, another works: real processes on loopback, small bounds.

Whoever goes past a bound meets RESOURCE_EXHAUSTED, and the other tenant's turns end. How long they
take, with the attack and without, is printed and not judged: this machine has other work too.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status
from sessile.v1 import fleet_pb2, fleet_pb2_grpc, session_pb2, session_pb2_grpc
from sessile.v1 import types_pb2 as pb

from gateway.rpc.status import error_from_rpc
from statestore.embedded import dies_with_parent
from tests.fuzz import small_process
from tests.fuzz.small_process import ADMISSION, GLUTTON, HANDSHAKE_S
from tests.support.servers import running_server, valkey_binary

ROOT = Path(__file__).parents[2]
TURNS = 6
TOKENS = 16
SLOWER = 4
"""At most so many times as long a turn may take: two tenants have half each, and their clients and
the servers share one machine. What queues alone cost is in ``tests/unit/test_fair_turns.py``."""
NOISE_MS = 250.0
ATTACK_S = 60.0
"""No attack lasts longer."""


@contextmanager
def process(role: str, redis_url: str) -> Iterator[str]:
    """One process of :mod:`tests.fuzz.small_process`; gives its address."""
    command = dies_with_parent([sys.executable, "-m", small_process.__name__, role, redis_url])
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        assert line, f"{role} did not start"
        yield line.split()[-1]
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a gateway over two workers."""
    with (
        running_server(valkey_binary()) as url,
        process("a", url),
        process("b", url),
        process("gateway", url) as found,
    ):
        yield found


class Tenant:
    """A plain client with a connection of its own."""

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", 256 << 20),
            ("grpc.enable_retries", 0),
        ]
        self.channel = aio.insecure_channel(address, options=options)
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(self.channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(self.channel)
        self.metadata = (("x-sessile-tenant", name),)

    async def open(self, request_id: str, content: str = "Be brief.") -> str:
        request = session_pb2.OpenSessionRequest(request_id=request_id)
        request.messages.add(role=pb.Message.ROLE_SYSTEM, content=content)
        answer = await self.sessions.OpenSession(request, metadata=self.metadata, timeout=20)
        return str(answer.session.session_id)

    def turn(self, session_id: str, turn_id: str, tokens: int = TOKENS) -> Any:
        request = pb.RunTurnRequest(session_id=session_id, turn_id=turn_id)
        request.messages.add(role=pb.Message.ROLE_USER, content="Hello")
        request.params.max_tokens = tokens
        request.params.ignore_eos = True
        return self.sessions.RunTurn(request, metadata=self.metadata, timeout=60)

    async def ready(self) -> None:
        with anyio.fail_after(60):
            while True:
                answer = await self.fleet.ListReplicas(
                    fleet_pb2.ListReplicasRequest(), wait_for_ready=True
                )
                states = [replica.state for replica in answer.replicas]
                if states.count(fleet_pb2.REPLICA_STATE_READY) == 2:
                    return
                await anyio.sleep(0.1)

    async def work(self, session_id: str) -> list[float]:
        """Milliseconds of turns, one after the other; raises if one is refused or does not end."""
        took: list[float] = []
        for index in range(TURNS):
            began = time.perf_counter()
            events: list[pb.TurnEvent] = []
            with anyio.fail_after(30):
                async for message in self.turn(session_id, f"t{index}"):
                    events.extend(message.events)
            assert events[-1].finished.status == pb.TURN_STATUS_COMMITTED
            took.append((time.perf_counter() - began) * 1000)
        return took


@dataclass
class Refusals:
    """What the attacker was told."""

    codes: Counter[str] = field(default_factory=Counter)
    without_delay: int = 0
    """RESOURCE_EXHAUSTED without RetryInfo."""

    def note(self, error: aio.AioRpcError) -> None:
        self.codes[error.code().name] += 1
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            details = status.details if status is not None else ()
            if not any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in details):
                self.without_delay += 1

    @property
    def refused(self) -> int:
        return self.codes["RESOURCE_EXHAUSTED"]


Attack = Callable[[Tenant, Refusals, anyio.Event], Coroutine[Any, Any, None]]
"""(attacker, what it was told, set once the attack is at its height); until cancelled."""


async def under(address: str, attack: Attack) -> tuple[Refusals, list[float], list[float]]:
    """The other tenant's turn times without the attack and with it."""
    victim, mallory = Tenant(address, "victim"), Tenant(address, "mallory")
    refusals, raging = Refusals(), anyio.Event()
    mark = f"{attack.__name__} {time.monotonic_ns()}"
    async with victim.channel, mallory.channel:
        await victim.ready()
        names = [await victim.open(f"{mark} {weather}") for weather in ("calm", "storm")]
        calm = await victim.work(names[0])
        async with anyio.create_task_group() as tasks:
            with anyio.move_on_after(ATTACK_S) as scope:
                tasks.start_soon(attack, mallory, refusals, raging)
                await raging.wait()
                storm = await victim.work(names[1])
            tasks.cancel_scope.cancel()
    assert not scope.cancelled_caught, "the attack kept the other tenant from working"
    print(
        f"\n{attack.__name__}: turn p50 {statistics.median(calm):.0f} ms calm, "
        f"{statistics.median(storm):.0f} ms under attack (worst {max(storm):.0f}); "
        f"attacker: {dict(refusals.codes)}"
    )
    return refusals, calm, storm


def check(address: str, attack: Attack) -> Refusals:
    """Turns that something else has slowed down meanwhile are measured again."""
    slow: list[tuple[float, float]] = []
    while True:
        refusals, calm, storm = anyio.run(under, address, attack)
        assert len(storm) == TURNS
        slow.append((statistics.median(calm), statistics.median(storm)))
        if slow[-1][1] <= SLOWER * slow[-1][0] + NOISE_MS:
            return refusals
        assert len(slow) < 3, f"medians of turns, calm and under attack, in ms: {slow}"


async def watches(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    session_id = await mallory.open(f"w{time.monotonic_ns()}")

    async def watch(index: int) -> None:
        kinds = (
            (mallory.fleet.WatchFleet, fleet_pb2.WatchFleetRequest()),
            (mallory.sessions.WatchSession, session_pb2.WatchSessionRequest(session_id=session_id)),
        )
        call, request = kinds[index % 2]
        try:
            async for _ in call(request, metadata=mallory.metadata):
                pass
        except aio.AioRpcError as error:
            refusals.note(error)
            raging.set()

    async with anyio.create_task_group() as tasks:
        for index in range(60):
            tasks.start_soon(watch, index)


async def calls(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:

    async def flood(index: int) -> None:
        while True:
            try:
                await mallory.open(f"{index}", content="x" * 50_000)
            except aio.AioRpcError as error:
                refusals.note(error)
                await anyio.sleep(0.02)  # both tenants' clients share this process
            if refusals.refused > 20:
                raging.set()

    async with anyio.create_task_group() as tasks:
        for index in range(40):
            tasks.start_soon(flood, index)


async def giants(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    for index in range(100):
        try:
            await mallory.open(f"g{index}", content="x" * (8 << 20))
        except aio.AioRpcError as error:
            refusals.note(error)
        if index == 2:
            raging.set()
    await anyio.sleep_forever()


async def streams(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    """As many as it gets, read by nobody."""
    mark = time.monotonic_ns()
    held = []
    try:
        for index in range(3 * ADMISSION.max_streams):
            session_id = await mallory.open(f"s{mark} {index}")
            call = mallory.turn(session_id, "t", tokens=1000)
            try:
                assert await call.read() is not aio.EOF
                held.append(call)
            except aio.AioRpcError as error:
                refusals.note(error)
                if refusals.refused >= 3:
                    raging.set()
                    break
        await anyio.sleep_forever()
    finally:
        for call in held:
            call.cancel()


async def sessions(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    mark = time.monotonic_ns()

    async def fill(first: int) -> None:
        for index in range(first, 2000, 8):
            try:
                await mallory.open(f"{mark} {index}")
            except aio.AioRpcError as error:
                refusals.note(error)

    raging.set()
    async with anyio.create_task_group() as tasks:
        for first in range(8):
            tasks.start_soon(fill, first)


async def tokens(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    """Long turns one after the other in more sessions than may run at once, each begun again as
    soon as it is refused; by a tenant with a quota of tokens."""
    glutton = Tenant(mallory.address, GLUTTON)
    ended = 0

    async def gorge(session_id: str) -> None:
        nonlocal ended
        number = 0
        while True:
            try:
                async for _ in glutton.turn(session_id, f"t{number}", tokens=200):
                    pass
                number += 1
                ended += 1
            except aio.AioRpcError as error:
                refusals.note(error)
                if error_from_rpc(error).reason == "QUOTA_EXCEEDED":
                    refusals.codes[error_from_rpc(error).metadata["quota"]] += 1
                await anyio.sleep(0.02)  # both tenants' clients share this process
            if refusals.codes["tokens_per_minute"]:
                raging.set()

    mark = time.monotonic_ns()
    async with glutton.channel, anyio.create_task_group() as tasks:
        for index in range(4):
            tasks.start_soon(gorge, await glutton.open(f"{mark} {index}"))
        await raging.wait()
        # What a minute gives and what two turns at once may be over it, and some time to notice.
        assert ended * 200 < 2 * 2_000, "it got more than its quota"


UNSENT = (
    "sessile.v1.SessionService/RunTurn",
    "sessile.v1.SessionService/GetSession",
    "sessile.v1.SessionService/WatchSession",
    "sessile.v1.FleetService/WatchFleet",
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


async def unsent(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    """Calls of every kind that send no request, more than the gateway takes at once."""
    begun = 0

    async def hold(path: str) -> None:
        nonlocal begun
        call: Any = mallory.channel.stream_stream(f"/{path}")(metadata=mallory.metadata)
        begun += 1
        try:
            await call.read()
        except aio.AioRpcError as error:
            refusals.note(error)
        finally:
            call.cancel()

    async with anyio.create_task_group() as tasks:
        for index in range(2 * ADMISSION.max_rpcs):
            tasks.start_soon(hold, UNSENT[index % len(UNSENT)])
            if index % 50 == 0:
                await anyio.sleep(0.02)  # both tenants' clients share this process
        while not refusals.refused:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        raging.set()


CONNECTIONS = 400


async def connections(mallory: Tenant, refusals: Refusals, raging: anyio.Event) -> None:
    """Half of them say nothing, the others the beginning of something."""
    host, _, port = mallory.address.rpartition(":")
    held: list[socket.socket] = []
    try:
        for index in range(CONNECTIONS):
            peer = socket.create_connection((host, int(port)), timeout=5)
            held.append(peer)
            if index % 2:
                peer.sendall(b"PRI * HTTP/2.0\r\n"[: 3 + index % 12])
            await anyio.lowlevel.checkpoint()
        # Those past the bound are closed at once, the others when their handshake is given up.
        with anyio.move_on_after(HANDSHAKE_S / 2):
            while refusals.codes["closed"] < CONNECTIONS - ADMISSION.max_connections:
                await anyio.sleep(0.05)
                refusals.codes["closed"] = sum(_closed(peer) for peer in held)
        raging.set()
        await anyio.sleep_forever()
    finally:
        for peer in held:
            peer.close()


def _closed(peer: socket.socket) -> bool:
    peer.setblocking(False)
    with suppress(BlockingIOError):
        try:
            return peer.recv(65536) == b""
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            return True
    return False


def test_watches_without_end_are_refused_and_turns_go_on(address: str) -> None:
    refusals = check(address, watches)
    assert refusals.refused >= 60 - ADMISSION.max_watches
    assert refusals.without_delay == 0


def test_calls_without_end_are_refused_and_turns_go_on(address: str) -> None:
    refusals = check(address, calls)
    assert refusals.refused
    assert refusals.without_delay == 0


def test_giant_messages_are_refused_and_turns_go_on(address: str) -> None:
    """By the transport: no retry delay, for a retry would not help."""
    assert check(address, giants).refused


def test_idle_connections_leave_turns_going_on(address: str) -> None:
    check(address, connections)


def test_streams_without_end_are_refused_and_turns_go_on(address: str) -> None:
    refusals = check(address, streams)
    assert refusals.refused
    assert refusals.without_delay == 0


def test_sessions_without_end_are_refused_and_turns_go_on(address: str) -> None:
    refusals = check(address, sessions)
    assert refusals.refused
    assert refusals.without_delay == 0


def test_a_tenant_that_eats_its_tokens_is_refused_and_others_turns_go_on(address: str) -> None:
    refusals = check(address, tokens)
    assert refusals.codes["tokens_per_minute"]
    assert refusals.codes["running_turns"]
    assert refusals.without_delay == 0


def test_calls_that_send_no_request_leave_turns_going_on(address: str) -> None:
    assert check(address, unsent).refused


def test_idle_connections_are_bounded(address: str) -> None:
    """The others wait for their handshake to time out."""
    closed = check(address, connections).codes["closed"]
    assert closed >= CONNECTIONS - ADMISSION.max_connections


async def _refused(address: str, method: str, request: bytes) -> aio.AioRpcError | None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with aio.insecure_channel(address, options=options) as channel:
        try:
            call: Any = channel.unary_unary(f"/sessile.v1.SessionService/{method}")
            await call(request, timeout=20)
        except aio.AioRpcError as error:
            return error
    return None


@pytest.mark.parametrize("name", ["x", "\U0001f600", "\x01", "\n"], ids=["ascii", "wide", "1", "2"])
def test_an_error_that_repeats_hostile_text_still_arrives(address: str, name: str) -> None:
    """Trailers are limited to 8 KiB, in which a character may take twelve bytes."""
    request = session_pb2.OpenSessionRequest(request_id="r", model=name * 5000)
    error = anyio.run(_refused, address, "OpenSession", request.SerializeToString())
    assert error is not None
    assert error.code() is grpc.StatusCode.NOT_FOUND, error.details()
    assert rpc_status.from_call(error) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["OpenSession", "RunTurn", "WatchSession"])
def test_bytes_that_are_no_message_are_the_callers_fault(address: str, method: str) -> None:
    error = anyio.run(_refused, address, method, b"\xff\xff\xff")
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    assert error_from_rpc(error).reason == "INVALID_REQUEST"
