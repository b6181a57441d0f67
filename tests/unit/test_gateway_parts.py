"""Parts of the gateway by themselves: fleet view, directory, settings, the replica client."""

from __future__ import annotations

import ast
import json
import sys
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from sessile.v1 import fleet_pb2, replica_pb2

from gateway.app.admission import Gate
from gateway.app.directory import SessionDirectory
from gateway.app.fleet_view import FleetView
from gateway.app.ports import ReplicaLost
from gateway.config import Admission, GatewayConfig, Tables, Times
from gateway.core import failover
from gateway.core.errors import DeadlineExceeded, NotFound, NotOwner, SessileError, WrongState
from gateway.core.failover import AskAgain, FailoverLimits, OwnerSeen, Take
from gateway.core.machines import ReplicaState
from gateway.rpc.auth import HeaderTenant
from gateway.rpc.replica_client import GrpcReplicaClients, translate
from gateway.rpc.serving import Serving
from gateway.rpc.status import DETAILS_KEY, code_of, to_status
from loadtest.simulation.loop import VirtualClock, run
from statestore.ports import StoreUnavailable
from statestore.records import ReplicaRecord, ReplicaRef
from statestore.replica_info import ReplicaDetails, ReplicaLoad
from tests.support.fleets import record
from tests.support.gateway_world import TENANT, simulated, world

CONFIG = GatewayConfig()
HANGING_CLIENT = """
import signal, sys
import grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    next(iter(channel.unary_stream("/test/Wait")(b"")))
    signal.raise_signal(signal.SIGSTOP)
"""


class FleetStore:
    """Only the fleet's records."""

    def __init__(self, *records: ReplicaRecord) -> None:
        self.records: Sequence[ReplicaRecord] = records
        self.reads = 0
        self.silent = False

    async def fleet(self) -> tuple[ReplicaRecord, ...]:
        self.reads += 1
        await anyio.sleep(0.01)
        if self.silent:
            raise StoreUnavailable("no answer")
        return tuple(self.records)


def view(store: FleetStore) -> FleetView:
    return FleetView(store, VirtualClock(), CONFIG)  # type: ignore[arg-type]


@simulated
async def test_a_silent_store_is_known_for_as_long_as_it_is_silent() -> None:
    """A gateway is not ready meanwhile."""
    store = FleetStore(record("a", 5))
    fleet = view(store)
    told = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        for silent in (False, True, False):
            store.silent = silent
            await anyio.sleep(1.0)
            told.append(fleet.store_answers)
        tasks.cancel_scope.cancel()
    assert told == [True, False, True]


@simulated
async def test_assumed_load_counts_until_heartbeats_include_it_or_the_attempt_ends() -> None:
    store = FleetStore(record("a", 5))
    fleet = view(store)
    await fleet.refresh()
    ref = ReplicaRef("a", 1)
    fleet.assume_turn("x", ref, 1000)
    fleet.assume_turn("y", ref, 10)
    fleet.assume_session("s", ref, "d0")
    replica = fleet.snapshot.replicas[0]
    assert (replica.turns, replica.pending_prefill_tokens, replica.sessions) == (2, 1010, 1)
    assert replica.assumed.leading == {"d0"}
    fleet.release("y")
    assert fleet.snapshot.replicas[0].turns == 1
    store.records = [record("a", 6)]
    await fleet.refresh()
    assert fleet.snapshot.replicas[0].turns == 1
    store.records = [record("a", 7, load=ReplicaLoad(running_turns=1, sessions=1).to_json())]
    await fleet.refresh()
    replica = fleet.snapshot.replicas[0]
    assert (replica.turns, replica.sessions, replica.assumed.turns) == (1, 1, 0)
    fleet.release("x")
    fleet.release("never assumed")


@simulated
async def test_overlapping_refreshes_share_one_read() -> None:
    store = FleetStore(record("a", 5))
    fleet = view(store)
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(fleet.refresh)
    assert store.reads == 1


@simulated
async def test_a_store_outage_leaves_the_last_snapshot_standing() -> None:
    store = FleetStore(record("a", 5))
    fleet = view(store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        await anyio.sleep(0.6)
        store.records = [record("a", 6)]
        await anyio.sleep(0.6)
        assert fleet.snapshot.replicas[0].state is ReplicaState.READY
        store.silent = True
        await anyio.sleep(60)
        assert fleet.snapshot.replicas[0].state is ReplicaState.READY
        tasks.cancel_scope.cancel()


@simulated
async def test_waiters_hear_of_changes_of_state_only() -> None:
    store = FleetStore(record("a", 5))
    fleet = view(store)
    await fleet.refresh()
    heard: list[int] = []

    async def listen() -> None:
        while True:
            await fleet.changed()
            heard.append(store.reads)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        await anyio.sleep(0.1)
        await fleet.refresh()
        assert not heard
        store.records = [record("a", 6)]
        await fleet.refresh()
        await anyio.sleep(0.1)
        assert len(heard) == 1
        fleet.report_refused(ReplicaRef("a", 1))
        await anyio.sleep(0.1)
        assert len(heard) == 2
        tasks.cancel_scope.cancel()


def test_records_that_cannot_be_read_or_spoken_to_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = record("a", 5), record("b", 5)
    broken = ReplicaRecord(bad.ref, "{", 1, "", False, False)
    newer = record("c", 5)
    newer = ReplicaRecord(
        newer.ref,
        newer.details.replace('"protocol_min":1', '"protocol_min":9'),
        1,
        "",
        False,
        False,
    )
    older = record("d", 5)
    details = older.details.replace('"protocol_min":1', '"protocol_min":0')
    details = details.replace('"protocol_max":1', '"protocol_max":0')
    older = ReplicaRecord(older.ref, details, 1, "", False, False)
    wider = record("e", 5)
    details = wider.details.replace('"protocol_max":1', '"protocol_max":7')
    wider = ReplicaRecord(wider.ref, details, 1, "", False, False)
    fleet = view(FleetStore(good, broken, newer, older, wider))

    async def look() -> None:
        await fleet.refresh()
        await fleet.refresh()

    run(look)
    assert [r.ref for r in fleet.snapshot.replicas] == [good.ref, wider.ref]
    told = [text for text in caplog.messages if "is ignored" in text]
    assert len(told) == 3, "each is told once"
    assert "9 to 1 of the replica API, this gateway 1 to 1; upgrade the gateway" in told[1]
    assert told[2].endswith("upgrade the replica")


@pytest.mark.parametrize(
    "wrong",
    [
        {"page_size": 0}, {"page_size": "16"}, {"page_size": True}, {"capacity_pages": -1},
        {"max_context_tokens": 2**32}, {"endpoint": None}, {"site": "a\nb"}, {"site": "\ud800"},
        {"kv_fingerprint": "no hex"}, {"features": "abc"}, {"features": [1]},
    ],
)  # fmt: skip
def test_details_of_a_replica_that_are_no_such_things_are_refused(wrong: dict[str, Any]) -> None:
    details = json.loads(record("a", 5).details)
    ReplicaDetails.from_json(json.dumps({**details, "new": 1}))
    with pytest.raises(ValueError):  # noqa: PT011 - any of them
        ReplicaDetails.from_json(json.dumps({**details, **wrong}))
    for name in ("endpoint", "page_size"):
        with pytest.raises(ValueError, match="missing"):
            ReplicaDetails.from_json(json.dumps({k: v for k, v in details.items() if k != name}))


@pytest.mark.parametrize(
    "wrong",
    [
        '{"running_turns": 1.5}', '{"prefill_tokens_per_s": NaN}', '{"decode_tokens_per_s": -1}',
        '{"prefill_tokens_per_s": 1e300}', '{"leading": []}', '{"leading": {"00": "1"}}',
        "[]", "[" * 8000, "null",
    ],
)  # fmt: skip
def test_a_load_that_is_none_is_refused(wrong: str) -> None:
    assert ReplicaLoad.from_json("") == ReplicaLoad()
    with pytest.raises(ValueError):  # noqa: PT011 - any of them
        ReplicaLoad.from_json(wrong)


@simulated
async def test_the_directory_forgets_the_least_recently_used_and_reads_it_again() -> None:
    config = GatewayConfig(tables=Tables(owners=2, salts=1))
    async with world(a=1) as w:
        ids = [await w.open(f"r{i}") for i in range(3)]
        directory = SessionDirectory(w.store, config)
        for session_id in ids:
            await directory.find(TENANT, session_id)
        assert len(directory._known) == 2
        assert (await directory.find(TENANT, ids[0])).session_id == ids[0]
        assert await directory.salt("x") != await directory.salt("y")
        assert len(directory._salts) == 1


@simulated
async def test_ids_that_are_no_session_ids_never_reach_the_store() -> None:
    async with world(a=1) as w:
        directory = SessionDirectory(w.store, CONFIG)
        for bad in ("", "ses_", "ses_a b", "ses_a.b.c", "x" * 10_000, "ses_{a}"):
            with pytest.raises(NotFound):
                await directory.read(TENANT, bad)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GatewayConfig(listen="nowhere"),
        lambda: GatewayConfig(listen="h:70000"),
        lambda: GatewayConfig(admission=Admission(max_streams=0)),
        lambda: GatewayConfig(times=Times(fleet_poll_s=0.9)),
        lambda: GatewayConfig(times=Times(sweep_period_s=4.0)),
        lambda: GatewayConfig(times=Times(default_turn_s=1e9)),
        lambda: FailoverLimits(backoff_base_ms=0),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_start(build: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (OwnerSeen(ReplicaState.READY, stale=False, refused=True), Take),
        (OwnerSeen(ReplicaState.SUSPECT, stale=True, refused=False), Take),
        (OwnerSeen(ReplicaState.DOWN, stale=True, refused=False), Take),
        (OwnerSeen(ReplicaState.READY, stale=False, refused=False), AskAgain),
        (OwnerSeen(ReplicaState.DRAINING, stale=False, refused=False), AskAgain),
        (OwnerSeen(ReplicaState.DRAINING, stale=True, refused=False), Take),
    ],
)
def test_an_owner_is_replaced_only_on_a_refusal_or_a_stale_heartbeat(
    seen: OwnerSeen, expected: type
) -> None:
    decision = failover.decide(seen, "ses_a", 0, FailoverLimits())
    assert isinstance(decision, expected)
    assert decision.why
    if expected is Take:
        assert decision.delay_ms == 0


def test_attempts_back_off_up_to_a_bound_and_not_in_step() -> None:
    limits = FailoverLimits(backoff_base_ms=10, backoff_max_ms=500)
    delays = [failover.backoff_ms("ses_a", n, limits) for n in range(60)]
    assert delays[0] == 0
    assert all(5 * 2 ** (n - 1) <= delays[n] < 10 * 2 ** (n - 1) for n in range(1, 6))
    assert max(delays) < 500
    assert failover.backoff_ms("ses_b", 5, limits) != delays[5]


def rpc_error(code: grpc.StatusCode, details: str, error: SessileError | None = None) -> object:
    trailing = aio.Metadata()
    if error is not None:
        status = to_status(error)
        trailing = aio.Metadata((DETAILS_KEY, status.SerializeToString()))
        code, details = code_of(error), status.message
    return translate(aio.AioRpcError(code, aio.Metadata(), trailing, details=details))


@pytest.mark.parametrize(
    ("details", "refused"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: Connection refused", True),
        ("Stream removed (Socket closed)", True),
        ("recvmsg:Connection reset by peer", True),
        ("sendmsg: Broken pipe", True),
        ("keepalive watchdog timeout", False),
        ("GOAWAY received", False),
        ("No route to host", False),
    ],
)
def test_a_broken_connection_is_told_apart_from_a_silent_one(details: str, refused: bool) -> None:
    error = rpc_error(grpc.StatusCode.UNAVAILABLE, details)
    assert isinstance(error, ReplicaLost)
    assert error.refused is refused


def test_what_a_replica_answers_is_not_mistaken_for_a_broken_connection() -> None:
    assert isinstance(rpc_error(grpc.StatusCode.UNKNOWN, "", NotOwner("not mine")), NotOwner)
    late = rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert isinstance(late, DeadlineExceeded)
    reset = rpc_error(grpc.StatusCode.INTERNAL, "Received RST_STREAM")
    assert isinstance(reset, ReplicaLost)
    assert not reset.refused


@pytest.mark.anyio
async def test_channels_are_kept_per_endpoint_up_to_their_bound() -> None:
    clients = GrpcReplicaClients(GatewayConfig(tables=Tables(channels=2)))
    try:
        first = clients.at("127.0.0.1:1")
        assert clients.at("127.0.0.1:1") is first
        clients.at("127.0.0.1:2")
        clients.at("127.0.0.1:1")
        clients.at("127.0.0.1:3")
        assert clients.at("127.0.0.1:1") is first
        clients.warm("127.0.0.1:1", 1)
        assert clients.at("127.0.0.1:1") is first
        clients.warm("127.0.0.1:1", 2)
        assert clients.at("127.0.0.1:1") is not first
    finally:
        await clients.aclose()


@pytest.mark.anyio
async def test_a_forgotten_channel_closes_when_its_last_call_ends_and_not_before() -> None:
    """Closed under a call it would leave the reader cancelled, as if its own task had been."""
    go_on = anyio.Event()

    async def begin_and_end(request: bytes, context: object) -> AsyncGenerator[bytes, None]:
        yield b"begun"
        await go_on.wait()
        yield b"ended"

    server = aio.server()
    method: Any = grpc.unary_stream_rpc_method_handler(begin_and_end)
    service = grpc.method_handlers_generic_handler(
        "sessile.v1.ReplicaService", {"DispatchTurn": method}
    )
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    clients = GrpcReplicaClients(GatewayConfig(tables=Tables(channels=1)))
    try:
        stream = clients.at(f"127.0.0.1:{port}").dispatch_turn(
            replica_pb2.DispatchTurnRequest(), 10.0
        )
        channel = weakref.ref(clients.at(f"127.0.0.1:{port}").channel)
        async with aclosing(stream):
            assert await anext(stream) == b"begun"
            for other in range(1, 20):
                clients.at(f"127.0.0.1:{other}")
            assert len(clients._clients) == 1
            assert channel() is not None
            go_on.set()
            assert [message async for message in stream] == [b"ended"]
        del stream
        assert channel() is None
    finally:
        await clients.aclose()
        await server.stop(None)


@pytest.mark.anyio
async def test_a_client_that_hangs_frees_its_stream() -> None:
    """Its connection stays open: only unanswered pings tell."""
    left = anyio.Event()

    async def wait(request: bytes, context: object) -> AsyncGenerator[bytes, None]:
        try:
            yield b"begun"
            await anyio.sleep_forever()
        finally:
            left.set()

    server = aio.server(options=Times(keepalive_s=0.2, keepalive_timeout_s=0.2).keepalive_options())
    method: Any = grpc.unary_stream_rpc_method_handler(wait)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test", {"Wait": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    command = [sys.executable, "-c", HANGING_CLIENT, f"127.0.0.1:{port}"]
    try:
        async with await anyio.open_process(command) as client:
            with anyio.fail_after(20):
                await left.wait()
            client.kill()
    finally:
        await server.stop(None)


# -- bounds ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def raised_overloads(source: str) -> Iterator[tuple[int, bool]]:
    """Lines that make an Overloaded, and whether it is given a retry delay."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "Overloaded":  # an EngineOverloaded cannot be made without its delay
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                delay = given.get("retry_after_ms")
                useless = delay is None or (isinstance(delay, ast.Constant) and not delay.value)
                yield node.lineno, not useless


def test_every_overload_says_when_to_come_back() -> None:
    made = [
        (f"{path.relative_to(ROOT)}:{line}", delayed)
        for folder in ("gateway", "workers", "statestore")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, delayed in raised_overloads(path.read_text())
    ]
    assert len(made) >= 5
    assert [where for where, delayed in made if not delayed] == []
    assert list(raised_overloads("Overloaded('full')\nx.Overloaded('', retry_after_ms=0)")) == [
        (1, False),
        (2, False),
    ]


class Aborted(Exception):
    """How a call was ended by its handler."""

    def __init__(self, code: grpc.StatusCode, details: bytes) -> None:
        self.code = code
        self.status = status_pb2.Status.FromString(details)


class Call:
    """The context of a call that a handler serves."""

    def __init__(self) -> None:
        self.heard = anyio.Event()

    async def write(self, message: bytes) -> None:
        del message
        self.heard.set()

    async def read(self) -> bytes:
        return b""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    def cancelled(self) -> bool:
        return False

    done = cancelled

    async def abort(self, code: grpc.StatusCode, text: str, metadata: Any) -> None:
        raise Aborted(code, dict(metadata)[DETAILS_KEY])


@simulated
async def test_one_watch_too_many_is_told_to_come_back_later() -> None:
    gate = Gate("max_watches", 2, 700)
    serving = Serving(HeaderTenant(), Gate("max_calls", 1, 1), gate)

    async def endless(tenant: str, request: object) -> AsyncGenerator[Any, None]:
        while True:
            yield request
            await anyio.sleep(1)

    watch = serving.streaming(endless, fleet_pb2.WatchFleetRequest).stream_stream
    async with anyio.create_task_group() as tasks:

        async def opened() -> anyio.CancelScope:
            call, scope = Call(), anyio.CancelScope()

            async def run() -> None:
                with scope:
                    await watch(b"", call)

            tasks.start_soon(run)
            await call.heard.wait()
            return scope

        first = await opened()
        await opened()
        with pytest.raises(Aborted) as caught:
            await watch(b"", Call())
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in caught.value.status.details)
        assert retry.retry_delay.ToMilliseconds() == 700
        first.cancel()
        await anyio.sleep(0.1)
        await opened()
        assert gate.taken == 2
        tasks.cancel_scope.cancel()
    assert gate.taken == 0


@simulated
async def test_an_undone_drain_ends_and_the_replica_takes_sessions_again() -> None:
    async with world(config=GatewayConfig(tables=Tables(drain_moves=1)), a=40) as w:
        for number in range(3):
            await w.finish(w.turn(await w.open(f"r{number}")))
        steps = w.gateway.drains.drain("a", 60.0, shutdown=True)
        assert (await anext(steps)).remaining == 3
        undone = [step async for step in w.gateway.drains.undo("a")]
        assert [(step.remaining, step.done) for step in undone] == [(3, True)]
        with pytest.raises(WrongState, match="was undone"):
            async for _ in steps:
                pass
        assert w.gateway.fleet.named("a").state is ReplicaState.READY
        assert (await w.finish(w.turn(await w.open("new")))).error is None
        await anyio.sleep(5.0)
        assert w.gateway.fleet.named("a").state is ReplicaState.READY, "it does not end"


@simulated
async def test_a_drain_moves_a_bounded_number_of_sessions_at_once() -> None:
    """The others wait for their turn: the drain is one call, and none of them is refused."""
    running, most = 0, 0
    async with world(config=GatewayConfig(tables=Tables(drain_moves=2)), a=40) as w:
        for number in range(6):
            await w.finish(w.turn(await w.open(f"r{number}")))
        target = await w.replica("b")
        usual = target.import_session

        async def slow(request: Any, timeout_s: float) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await anyio.sleep(0.1)
            running -= 1
            return await usual(request, timeout_s)

        target.import_session = slow  # type: ignore[method-assign]
        steps = [step async for step in w.gateway.drains.drain("a", 60.0, shutdown=False)]
    assert (steps[-1].remaining, steps[-1].failed, most) == (0, 0, 2)
