"""Calls other than turns: idempotent repeats, paging, forks, operators, and the sync face."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sessile import (
    InvalidRequest,
    Message,
    ReplicaState,
    Runtime,
    Sessile,
    SessionState,
    Tokens,
    Tool,
    Unavailable,
)
from sessile import sync as sessile_sync
from sessile.v1 import fleet_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from tests.support.fake_gateway import (
    OUTPUT_START,
    Cut,
    Fail,
    FakeGateway,
    Hang,
    accepted,
    finished,
    gateway_in_a_thread,
    listing,
    place,
    serving,
    session,
    tokens,
)


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


async def no_wait(seconds: float) -> None:
    await asyncio.sleep(0)


def client_of(gateway: FakeGateway) -> Sessile:
    return Sessile(gateway.target, runtime=Runtime(sleep=no_wait))


@pytest.mark.anyio
async def test_opening_is_repeated_under_the_same_request_id(gateway: FakeGateway) -> None:
    gateway.answers += [Cut(), session_pb2.OpenSessionResponse(session=session("ses_x"))]
    async with client_of(gateway) as client:
        handle = await client.open(
            model="m",
            system="be brief",
            messages=[Message.user("hi"), Message.assistant("hello")],
            tools=[Tool("add", "adds", {"type": "object", "properties": {}})],
            labels={"job": "j"},
            temperature=0.5,
        )
    first, second = gateway.seen
    assert first == second
    assert first.request_id
    assert [message.role for message in first.messages] == [
        pb.Message.ROLE_SYSTEM,
        pb.Message.ROLE_USER,
        pb.Message.ROLE_ASSISTANT,
    ]
    assert first.tools[0].parameters_json == '{"properties": {}, "type": "object"}'
    assert first.default_params.temperature == 0.5
    assert dict(first.labels) == {"job": "j"}
    assert handle.session_id == "ses_x"
    assert handle.info is not None
    assert handle.info.state is SessionState.OPEN


@pytest.mark.anyio
async def test_unknown_sampling_names_are_refused_before_anything_is_sent(
    gateway: FakeGateway,
) -> None:
    async with client_of(gateway) as client:
        with pytest.raises(InvalidRequest, match="temprature"):
            client.session("ses_a").run("hi", temprature=1.0)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match="list"):
            client.session("ses_a").run("hi", stop="x")
    assert not gateway.seen


@pytest.mark.anyio
async def test_a_value_that_the_wire_cannot_carry_is_an_invalid_request(
    gateway: FakeGateway,
) -> None:
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: handle.run("\ud800").result(),
            lambda: handle.run({"role": "user"}).result(),  # type: ignore[arg-type]
            lambda: handle.run(None).result(),  # type: ignore[arg-type]
            lambda: handle.run("hi", max_tokens=1 << 40).result(),
            lambda: handle.run("hi", timeout_s=math.inf).result(),
            lambda: handle.attach(7).result(),  # type: ignore[arg-type]
            lambda: handle.fork(at_turn=-1),
            lambda: handle.transcript(from_turn=1 << 70),
            lambda: handle.close(retention_s=-1),
            lambda: client.open(system="\udfff"),
            lambda: client.open(tools=[{"name": "add"}]),  # type: ignore[list-item]
            lambda: anext(client.list(states=["open"])),  # type: ignore[list-item]
            lambda: client.fleet.migrate("ses_a", timeout_s=1e300),
            lambda: anext(client.fleet.drain("\ud800")),
        ]
        for call in calls:
            with pytest.raises(InvalidRequest, match="cannot be sent"):
                await call()
    assert not gateway.seen


@pytest.mark.parametrize(
    "metadata", [{"tenant": "büro"}, {"tenant": "a\n"}, {"metadata": [("key", "ключ")]}], ids=str
)
def test_metadata_that_cannot_be_sent_is_an_invalid_request(metadata: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="ASCII"):
        Sessile("127.0.0.1:1", **metadata)


@pytest.mark.anyio
async def test_a_very_long_time_limit_has_not_passed_already(gateway: FakeGateway) -> None:
    moved = fleet_pb2.MigrationResult(session_id="ses_a", moved=True)
    gateway.answers.append(fleet_pb2.MigrateSessionResponse(result=moved))
    async with client_of(gateway) as client:
        assert (await client.fleet.migrate("ses_a", timeout_s=1e12)).moved


@pytest.mark.anyio
async def test_a_request_over_the_transports_bound_is_refused_at_once() -> None:
    """Not as Overloaded, which is repeated."""

    async def no_repeat(seconds: float) -> None:
        pytest.fail("repeated")

    async with (
        serving(("grpc.max_receive_message_length", 1000)) as gateway,
        Sessile(gateway.target, runtime=Runtime(sleep=no_repeat)) as client,
    ):
        with pytest.raises(InvalidRequest, match="less in one call"):
            await client.open(system="x" * 1000)
        with pytest.raises(InvalidRequest, match="less in one call"):
            await client.session("ses_a").run("x" * 1000).result()


@pytest.mark.anyio
async def test_listing_pages_up_to_the_limit(gateway: FakeGateway) -> None:
    gateway.answers += [
        session_pb2.ListSessionsResponse(
            sessions=[session("ses_a"), session("ses_b")], next_page_token="2"
        ),
        session_pb2.ListSessionsResponse(sessions=[session("ses_c")], next_page_token="3"),
    ]
    async with client_of(gateway) as client:
        found = [info async for info in client.list(states=[SessionState.CLOSED], limit=3)]
    assert [info.session_id for info in found] == ["ses_a", "ses_b", "ses_c"]
    first, second = gateway.seen
    assert (first.page_size, second.page_size, second.page_token) == (3, 1, "2")
    assert list(first.states) == [session_pb2.SESSION_STATE_CLOSED]


@pytest.mark.anyio
async def test_a_transcript_is_read_to_its_end(gateway: FakeGateway) -> None:
    gateway.answers += [
        session_pb2.GetTranscriptResponse(
            turns=[session_pb2.TranscriptTurn(turn_id="t0", output_text="x")], next_turn_index=1
        ),
        session_pb2.GetTranscriptResponse(
            turns=[session_pb2.TranscriptTurn(turn_id="t1", status=pb.TURN_STATUS_COMMITTED)]
        ),
    ]
    async with client_of(gateway) as client:
        turns = await client.session("ses_a").transcript(token_ids=True)
    assert [turn.turn_id for turn in turns] == ["t0", "t1"]
    assert gateway.seen[1].from_turn_index == 1
    assert gateway.seen[1].include_token_ids


@pytest.mark.anyio
async def test_a_fork_knows_where_it_begins(gateway: FakeGateway) -> None:
    fork = session("ses_a.1", head=place(30), turn_index=3, parent_id="ses_a")
    gateway.answers.append(session_pb2.ForkSessionResponse(session=fork))
    gateway.turns.append([accepted(), tokens(0), finished(2)])
    async with client_of(gateway) as client:
        child = await client.session("ses_a").fork(at_turn=3)
        await child.run("on").result()
    assert gateway.seen[0].at_turn_index == 3
    assert gateway.seen[1].precondition == pb.Precondition(head=place(30), turn_index=3)


@pytest.mark.anyio
async def test_a_busy_record_gives_no_precondition(gateway: FakeGateway) -> None:
    busy = session(head=place(30), active_turn_id="t9")
    gateway.answers.append(session_pb2.GetSessionResponse(session=busy))
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        assert (await handle.refresh()).active_turn_id == "t9"
        assert handle.head is None


@pytest.mark.anyio
async def test_a_watch_goes_on_after_a_cut(gateway: FakeGateway) -> None:
    gateway.answers += [
        session_pb2.WatchSessionResponse(session=session(turn_index=1)),
        Cut(),
        session_pb2.WatchSessionResponse(session=session(turn_index=2)),
    ]
    async with client_of(gateway) as client:
        watch = client.session("ses_a").watch()
        assert [(await anext(watch)).turn_index for _ in range(2)] == [1, 2]
        await watch.aclose()


@pytest.mark.anyio
async def test_a_watch_ends_with_its_session(gateway: FakeGateway) -> None:
    closed = session()
    closed.state = session_pb2.SESSION_STATE_CLOSED
    gateway.answers += [session_pb2.WatchSessionResponse(session=s) for s in (session(), closed)]
    async with client_of(gateway) as client, asyncio.timeout(5):
        states = [info.state async for info in client.session("ses_a").watch()]
    assert states == [SessionState.OPEN, SessionState.CLOSED]
    assert len(gateway.seen) == 1


@pytest.mark.anyio
async def test_a_drain_goes_on_through_another_gateway(gateway: FakeGateway) -> None:
    gateway.answers += [
        fleet_pb2.DrainReplicaResponse(moved_with_kv=1, remaining=1),
        Cut(),
        fleet_pb2.DrainReplicaResponse(moved_with_kv=1, done=True),
    ]
    now, steps = 0.0, []
    runtime = Runtime(now=lambda: now, sleep=no_wait)
    async with Sessile(["127.0.0.1:1", gateway.target], runtime=runtime) as client:
        async for step in client.fleet.drain("r1", timeout_s=120.0):
            steps.append((step.remaining, step.done))
            now += 100.0
    assert steps == [(1, False), (0, True)]
    assert [request.timeout_ms for request in gateway.seen] == [120_000, 20_000]


@pytest.mark.anyio
async def test_operators_see_and_drain_replicas(gateway: FakeGateway) -> None:
    gateway.answers.append(listing("r1", "r2"))
    async with client_of(gateway) as client:
        replicas = await client.fleet.replicas()
        gateway.answers += [
            fleet_pb2.DrainReplicaResponse(moved_with_kv=1, remaining=1),
            fleet_pb2.DrainReplicaResponse(moved_with_kv=2, done=True),
        ]
        progress = [step async for step in client.fleet.drain("r1", shutdown=True)]
    assert [(str(replica.ref), replica.state) for replica in replicas] == [
        ("r1", ReplicaState.READY),
        ("r2", ReplicaState.READY),
    ]
    assert [step.done for step in progress] == [False, True]
    assert gateway.seen[1].shutdown


@pytest.mark.anyio
async def test_a_move_is_not_repeated_unless_it_was_refused(gateway: FakeGateway) -> None:
    moved = fleet_pb2.MigrationResult(session_id="ses_a", moved=True, verified_tokens=32)
    gateway.answers += [
        Cut(),
        Fail(errors.Overloaded("busy")),
        fleet_pb2.MigrateSessionResponse(result=moved),
    ]
    async with client_of(gateway) as client:
        with pytest.raises(Unavailable):
            await client.fleet.migrate("ses_a")
        result = await client.fleet.migrate("ses_a", target="r2")
    assert result.moved
    assert result.verified_tokens == 32
    assert len(gateway.seen) == 3


@pytest.mark.anyio
async def test_a_client_that_is_not_open_says_so(gateway: FakeGateway) -> None:
    client = client_of(gateway)
    with pytest.raises(RuntimeError, match="async with"):
        client.session("ses_a")


@pytest.mark.parametrize("targets", [[], "", ["127.0.0.1:1", ""]], ids=str)
def test_a_client_needs_the_address_of_every_gateway(targets: str | list[str]) -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        Sessile(targets)


def test_the_sync_face_has_the_same_names() -> None:
    threads = threading.active_count()
    with gateway_in_a_thread() as gateway:
        gateway.answers += [
            session_pb2.OpenSessionResponse(session=session()),
            session_pb2.ListSessionsResponse(sessions=[session()]),
            listing("r1"),
        ]
        whole = [accepted(), tokens(0), finished(2)]
        gateway.turns += [whole, whole, [accepted(), Hang()]]
        with sessile_sync.Sessile(gateway.target, tenant="acme") as client:
            handle = client.open(system="s")
            events = list(handle.run("hi"))
            assert [e.text for e in events if isinstance(e, Tokens)] == ["a b "]
            assert handle.head is not None
            assert handle.head.length == OUTPUT_START + 2
            assert handle.run("hi").result().text == "a b "
            assert [info.session_id for info in client.list()] == ["ses_a"]
            assert [str(replica.ref) for replica in client.fleet.replicas()] == ["r1"]
            with handle.run("hi", turn_id="t3") as turn:
                next(turn)
        assert gateway.requests(session_pb2.CancelTurnRequest)[0].turn_id == "t3"
        assert set(gateway.tenants) == {"acme"}
        with pytest.raises(RuntimeError, match="with"):
            client.session("ses_a")
    assert threading.active_count() <= threads + 1  # gRPC keeps its poller
