"""Gateways and workers as real processes on real sockets over a real Valkey."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sessile.v1 import (
    fleet_pb2,
    fleet_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)

from gateway.cli.launch import Child, Cluster
from gateway.core.errors import NotFound, SessileError
from gateway.rpc.status import error_from_rpc
from tests.support.patience import PATIENT
from tests.support.servers import running_server, valkey_binary

pytestmark = pytest.mark.anyio

STEP_MS = 10
READY_TIMEOUT_S = 60
WORKERS = ("a", "b")
LONG = 300
"""Tokens of a turn that something happens to: it still runs then, even if a process has stood still
for some seconds."""
RETRIES = [
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": f"sessile.v1.{name}"}],
                        "retryPolicy": {
                            "maxAttempts": 5,
                            "initialBackoff": "0.1s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                    for name in ("SessionService", "FleetService")
                ]
            }
        ),
    )
]
"""As a client has them: a gateway says so where its store does not answer for 2 s."""
ENVIRONMENT = {**PATIENT, "SESSILE_GATEWAY__TIMES__SHUTDOWN_GRACE_S": "60"}


class Fleet(Cluster):
    """Two gateways and the replicas of ``WORKERS``."""

    def worker(self, name: str) -> Child:
        """The latest process of a replica."""
        return next(child for child in reversed(self.workers) if child.name == name)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def fleet(
    anyio_backend: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    options = {"step_ms": str(STEP_MS), "decode_token_ms": "0", "eos_probability": "0"}
    logs = tmp_path_factory.mktemp("logs")
    with running_server(valkey_binary()) as url:
        async with Fleet(
            engine_options=options, redis_url=url, log_directory=logs, environment=ENVIRONMENT
        ) as made:
            for name in WORKERS:
                await made.start_worker(name)
            await made.start(gateways=2, workers=0)
            yield made


class Agent:
    """A plain gRPC client of one gateway."""

    def __init__(self, channel: aio.Channel) -> None:
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def ready(self, names: tuple[str, ...] = WORKERS) -> None:
        with anyio.fail_after(READY_TIMEOUT_S):
            while True:
                answer = await self.fleet.ListReplicas(fleet_pb2.ListReplicasRequest())
                up = {
                    r.ref.replica_id
                    for r in answer.replicas
                    if r.state == fleet_pb2.REPLICA_STATE_READY
                }
                if up >= set(names):
                    return
                await anyio.sleep(0.1)

    async def open(self, request_id: str) -> str:
        request = session_pb2.OpenSessionRequest(request_id=request_id)
        request.messages.add(role=types_pb2.Message.ROLE_SYSTEM, content="You are terse.")
        answer = await self.sessions.OpenSession(request)
        return str(answer.session.session_id)

    async def owner(self, session_id: str) -> str:
        answer = await self.sessions.GetSession(
            session_pb2.GetSessionRequest(session_id=session_id)
        )
        return str(answer.session.owner.replica.replica_id)


@dataclass
class Heard:
    """A turn's stream as its client received it."""

    events: list[types_pb2.TurnEvent] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def tokens(self) -> list[int]:
        """Checks that positions and text offsets are contiguous."""
        found: list[int] = []
        position: int | None = None
        for event in self.events:
            if event.HasField("tokens"):
                assert position in (None, event.tokens.position)
                position = event.tokens.position + len(event.tokens.token_ids)
                found += event.tokens.token_ids
        return found

    @property
    def finished(self) -> types_pb2.TurnFinished:
        return self.events[-1].finished

    def kinds(self) -> set[str]:
        return {event.WhichOneof("event") or "?" for event in self.events}

    def take(self, message: types_pb2.TurnStream) -> None:
        for event in message.events:
            self.events.append(event)
            self.times.append(time.perf_counter())
            said = event.tokens if event.HasField("tokens") else event.finished
            if said.text:
                assert said.text_offset == len(self.text)
                self.text += said.text


def turn(
    session_id: str, turn_id: str, tokens: int = 30, **fields: Any
) -> types_pb2.RunTurnRequest:
    request = types_pb2.RunTurnRequest(session_id=session_id, turn_id=turn_id, **fields)
    if not request.attach_only:
        request.messages.add(role=types_pb2.Message.ROLE_USER, content=f"Say {turn_id}.")
        request.params.max_tokens = tokens
        request.params.ignore_eos = True
        request.params.seed = 7
    return request


@asynccontextmanager
async def agent(gateway: Child) -> AsyncIterator[Agent]:
    async with aio.insecure_channel(gateway.address, options=RETRIES) as channel:
        made = Agent(channel)
        await made.ready()
        yield made


async def logged(child: Child, text: str) -> None:
    with anyio.fail_after(60):
        while text not in child.log.read_text(errors="replace"):  # noqa: ASYNC110
            await anyio.sleep(0.02)


async def ended(child: Child) -> None:
    while child.running:  # noqa: ASYNC110 - nobody tells when a child ends
        await anyio.sleep(0.05)


async def hear(stream: Any) -> Heard:
    heard = Heard()
    async for message in stream:
        heard.take(message)
    return heard


async def run_until(stream: Any, heard: Heard, tokens: int) -> None:
    async for message in stream:
        heard.take(message)
        if len(heard.tokens) >= tokens:
            return


async def test_a_conversation_of_turns_stays_on_one_replica_and_can_be_read_back(
    fleet: Fleet,
) -> None:
    async with agent(fleet.gateways[0]) as client:
        session_id = await client.open("conversation")
        owners = set()
        heard = []
        for number in range(3):
            heard.append(await hear(client.sessions.RunTurn(turn(session_id, f"t{number}"))))
            owners.add(await client.owner(session_id))
        assert len(owners) == 1
        for one in heard:
            assert one.finished.status == types_pb2.TURN_STATUS_COMMITTED
            assert len(one.tokens) == 30
        # The second turn found the first one's KV where it was left.
        assert heard[2].finished.usage.cached_tokens > heard[0].finished.usage.input_tokens
        transcript = await client.sessions.GetTranscript(
            session_pb2.GetTranscriptRequest(session_id=session_id)
        )
        assert [t.turn_id for t in transcript.turns] == ["t0", "t1", "t2"]
        assert [t.output_text for t in transcript.turns] == [h.text for h in heard]
        again = await hear(client.sessions.RunTurn(turn(session_id, "t1")))
        assert again.tokens == heard[1].tokens
        assert again.text == heard[1].text


async def test_a_worker_killed_in_mid_turn_costs_neither_a_token_nor_a_second(
    fleet: Fleet,
) -> None:
    async with agent(fleet.gateways[0]) as client:
        gaps_s: list[float] = []
        # What a kill costs by itself, and not with whatever else held up a process meanwhile.
        while not gaps_s or min(gaps_s) >= 1.0:
            assert len(gaps_s) < 3, f"kills cost {gaps_s} s"
            gaps_s.append(await gap_of_a_kill(fleet, client, f"kill {len(gaps_s)}"))


async def gap_of_a_kill(fleet: Fleet, client: Agent, name: str) -> float:
    """Seconds without a token where a turn's worker is killed; no token is lost or another."""
    session_id = await client.open(name)
    fork = await client.sessions.ForkSession(
        session_pb2.ForkSessionRequest(session_id=session_id, request_id="same")
    )
    undisturbed = await hear(
        client.sessions.RunTurn(turn(fork.session.session_id, "t", tokens=LONG))
    )
    heard = Heard()
    stream = client.sessions.RunTurn(turn(session_id, "t", tokens=LONG))
    await run_until(stream, heard, 20)
    victim = await client.owner(session_id)
    fleet.worker(victim).kill()
    async for message in stream:
        heard.take(message)
    await fleet.start_worker(victim)
    await client.ready()
    assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
    assert "moved" in heard.kinds()
    # The engine's next token is a hash of its whole context.
    assert heard.tokens == undisturbed.tokens
    assert heard.text == undisturbed.text
    moved = next(i for i, e in enumerate(heard.events) if e.HasField("moved"))
    return heard.times[moved] - heard.times[moved - 1]


async def test_a_second_gateway_attaches_to_a_running_turn(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as first, agent(fleet.gateways[1]) as second:
        session_id = await first.open("attach")
        whole = Heard()
        stream = first.sessions.RunTurn(turn(session_id, "t", tokens=LONG))
        await run_until(stream, whole, 10)
        attached = await hear(second.sessions.RunTurn(turn(session_id, "t", attach_only=True)))
        async for message in stream:
            whole.take(message)
        assert attached.tokens == whole.tokens
        assert attached.events[0].accepted.attached


async def test_a_client_that_was_cut_off_resumes_through_another_gateway(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as first, agent(fleet.gateways[1]) as second:
        session_id = await first.open("resume")
        begin = Heard()
        stream = first.sessions.RunTurn(turn(session_id, "t", tokens=60))
        await run_until(stream, begin, 10)
        stream.cancel()
        last = [e.tokens for e in begin.events if e.HasField("tokens")][-1]
        position = types_pb2.Position(
            length=last.position + len(last.token_ids), digest=last.digest
        )
        rest = Heard(text=begin.text)
        async for message in second.sessions.RunTurn(
            turn(session_id, "t", tokens=60, resume_from=position)
        ):
            rest.take(message)
        assert len(begin.tokens) + len(rest.tokens) == 60
        assert rest.finished.text_end == len(rest.text)


async def test_a_running_turn_is_moved_with_its_kv(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as client:
        session_id = await client.open("move")
        await hear(client.sessions.RunTurn(turn(session_id, "t0", tokens=60)))
        heard = Heard()
        stream = client.sessions.RunTurn(turn(session_id, "t1", tokens=LONG))
        await run_until(stream, heard, 20)
        source = await client.owner(session_id)
        answer = await client.fleet.MigrateSession(
            fleet_pb2.MigrateSessionRequest(session_id=session_id)
        )
        result = answer.result
        assert result.moved, result.detail
        assert result.running_turn
        assert result.verified_tokens > 100
        assert result.bytes_copied > 0
        async for message in stream:
            heard.take(message)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        assert len(heard.tokens) == LONG
        assert await client.owner(session_id) != source


async def test_a_stopped_worker_is_replaced_after_its_lease_and_wakes_up_fenced(
    fleet: Fleet,
) -> None:
    async with agent(fleet.gateways[0]) as client:
        session_id = await client.open("zombie")
        heard = Heard()
        stream = client.sessions.RunTurn(turn(session_id, "t", tokens=60))
        await run_until(stream, heard, 10)
        victim = await client.owner(session_id)
        fleet.worker(victim).kill(signal.SIGSTOP)
        try:
            with anyio.fail_after(60):
                async for message in stream:
                    heard.take(message)
        finally:
            fleet.worker(victim).kill(signal.SIGCONT)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        assert len(heard.tokens) == 60
        await client.ready()
        more = await hear(client.sessions.RunTurn(turn(session_id, "t2")))
        assert more.finished.status == types_pb2.TURN_STATUS_COMMITTED


async def test_errors_arrive_with_reason_and_advice(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as client:

        async def error_of(call: Any) -> SessileError:
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            return error_from_rpc(caught.value)

        request = session_pb2.GetSessionRequest(session_id="ses_nobody")
        unknown = await error_of(client.sessions.GetSession(request))
        assert isinstance(unknown, NotFound)
        assert unknown.reason == "SESSION_NOT_FOUND"
        assert unknown.hint
        session_id = await client.open("foreign")
        request = session_pb2.GetSessionRequest(session_id=session_id)
        foreign = await error_of(
            client.sessions.GetSession(request, metadata=(("x-sessile-tenant", "other"),))
        )
        assert foreign.reason == "SESSION_NOT_FOUND"
        bad = await error_of(
            client.sessions.GetSession(request, metadata=(("x-sessile-tenant", "a b"),))
        )
        assert bad.reason == "INVALID_REQUEST"
        late = await error_of(
            hear(client.sessions.RunTurn(turn(session_id, "nope", attach_only=True)))
        )
        assert late.reason == "TURN_NOT_FOUND"


async def test_health_is_served(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as client:
        for name in ("", "sessile.v1.SessionService"):
            answer = await client.health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_replica_drains_and_its_process_ends(fleet: Fleet) -> None:
    async with agent(fleet.gateways[0]) as client:
        sessions = [await client.open(f"drain-{i}") for i in range(4)]
        for session_id in sessions:
            await hear(client.sessions.RunTurn(turn(session_id, "t0")))
        progress = [
            p
            async for p in client.fleet.DrainReplica(
                fleet_pb2.DrainReplicaRequest(replica_id="a", shutdown=True)
            )
        ]
        assert progress[-1].done
        assert progress[-1].remaining == 0
        for session_id in sessions:
            assert await client.owner(session_id) == "b"
            heard = await hear(client.sessions.RunTurn(turn(session_id, "t1")))
            assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        drained = fleet.worker("a")
        with anyio.fail_after(READY_TIMEOUT_S):
            await ended(drained)
        assert drained.exit_code == 0
        await fleet.start_worker("a")


async def test_a_gateway_that_is_told_to_stop_lets_its_streams_end(fleet: Fleet) -> None:
    extra = await fleet.start_gateway()
    async with agent(extra) as client:
        session_id = await client.open("stop")
        heard = Heard()
        stream = client.sessions.RunTurn(turn(session_id, "t", tokens=60))
        await run_until(stream, heard, 5)
        with anyio.fail_after(30):
            await fleet.stop([extra], timeout_s=15)
            assert extra.exit_code == 0
            async for message in stream:
                heard.take(message)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        with pytest.raises(aio.AioRpcError) as caught:
            await client.open("too late")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_gateway_that_is_told_twice_to_stop_ends_at_once(fleet: Fleet) -> None:
    extra = await fleet.start_gateway()
    async with agent(extra) as client:
        session_id = await client.open("stop twice")
        stream = client.sessions.RunTurn(turn(session_id, "t", tokens=3000))
        await run_until(stream, Heard(), 5)
        extra.kill(signal.SIGTERM)
        await logged(extra, "signal SIGTERM: stopping")  # a signal that waits is not sent twice
        await anyio.sleep(0.3)
        assert extra.running
        extra.kill(signal.SIGTERM)
        with anyio.fail_after(15):  # neither the turn nor the gateway's patience ends by then
            await ended(extra)
        with pytest.raises(aio.AioRpcError):
            async for _ in stream:
                pass
