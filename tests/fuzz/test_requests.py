"""Hostile requests to every call of the gateway and of the worker, through the very handlers that
their servers run: each ends in a documented error or a result, and harms no session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.loop import run
from statestore.digest import RollingDigest
from statestore.records import SessionState
from tests.fuzz.hostile import Hostile, graft, seeds
from tests.fuzz.profile import fuzz
from tests.support.served_world import (
    FLEET,
    REPLICA,
    SERVICES,
    SESSIONS,
    STRANGER,
    TENANT,
    Served,
    finished,
    served,
)
from tests.support.wire import Answer

WATCH_S = 3.0
GRAFTED = (
    "session_id", "turn_id", "request_id", "model", "epoch", "replica", "source", "source_endpoint",
    "target", "tenant", "resume_from", "up_to", "precondition", "kv_fingerprint", "replica_id",
    "target_replica_id", "role", "params", "default_params", "timeout_ms", "attach_only", "tools",
    "turn", "request", "messages", "page_token", "labels", "max_turns", "page_size", "retention_ms",
    "at_turn_index",
)  # fmt: skip


def test_every_call_is_fuzzed() -> None:
    for module in (session_pb2, fleet_pb2, replica_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            fuzzed = SERVICES[service.full_name]
            assert {m.name: m.input_type.full_name for m in service.methods} == {
                name: kind.DESCRIPTOR.full_name for name, kind in fuzzed.items()
            }


@dataclass(frozen=True)
class Shot:
    """One hostile call, drawn from its seed."""

    method: str
    kind: type[Message]
    seed: int

    def fired(self, real: Mapping[str, Any]) -> tuple[str, bytes]:
        """Tenant and request. Three in four have what a well-behaved caller would send in most
        fields; others would be refused at the door."""
        hostile = Hostile(self.seed)
        draw = hostile.draw
        message = hostile.message(self.kind)
        if draw.random() < 0.75:
            wrong = set(draw.sample(GRAFTED, draw.randrange(4)))
            kind = draw.choice(("new turn", "new turn", "old turn"))
            graft(message, {**real, **real[kind]}, set(GRAFTED) - wrong)
        request = message.SerializeToString()
        if draw.random() < 0.15:
            request = hostile.damage(request)
        return draw.choice((TENANT, TENANT, TENANT, TENANT, STRANGER)), request


def shots(methods: Mapping[str, type[Message]]) -> st.SearchStrategy[Shot]:
    """Any call of these."""
    names = st.sampled_from(sorted(methods))
    return st.builds(lambda name, seed: Shot(name, methods[name], seed), names, seeds)


@dataclass
class Target(Served):
    """A gateway and a worker over one store, a session with a turn behind it, and a bystander's."""

    session_id: str = ""
    bystander: str = ""
    real: Mapping[str, Any] = field(default_factory=dict)

    async def fire(self, shot: Shot) -> Answer:
        tenant, request = shot.fired(self.real)
        patience_s = WATCH_S if shot.method.startswith("Watch") else 400.0
        answer = await self.call(shot.method, request, tenant, patience_s=patience_s)
        assert not answer.left or shot.method.startswith("Watch"), "the call does not end"
        return answer

    async def check_unharmed(self) -> None:
        """Both sessions can go on, and their ledgers are whole."""
        assert not self.world.failures, self.world.failures
        for session_id, tenant in ((self.session_id, TENANT), (self.bystander, "bystander")):
            await self._check_ledger(session_id)
            if await self._made_idle(session_id, tenant):
                answer = await self.turn(session_id, "after the attack", tenant)
                answer.check()
                assert finished(answer).status == pb.TURN_STATUS_COMMITTED, answer
            await self._check_ledger(session_id)
        for replica in self.world.live_replicas():
            replica.engine.check_integrity()

    async def _made_idle(self, session_id: str, tenant: str) -> bool:
        """What the attack may rightly have done is undone; False if it closed the session."""
        session = await self.world.store.get_session(session_id)
        if session is None or session.state is SessionState.CLOSED:
            return False
        if session.active_turn_id is not None:
            cancel = session_pb2.CancelTurnRequest(
                session_id=session_id, turn_id=session.active_turn_id
            )
            (await self.call("CancelTurn", cancel, tenant)).check()
        if session.state is SessionState.SUSPENDED:
            resume = session_pb2.ResumeSessionRequest(session_id=session_id)
            (await self.call("ResumeSession", resume, tenant)).check()
        return True

    async def _check_ledger(self, session_id: str) -> None:
        store = self.world.store
        session = await store.get_session(session_id)
        if session is None:
            return
        tokens = await store.read_tokens(session, 0, session.head.length)
        salt = await store.tenant_salt(session.tenant)
        assert RollingDigest.of(salt, tokens).position() == session.head
        turns = await store.get_turns(session, 0, 1000)
        at = 0
        for turn in turns:
            assert turn.input_start == at
            assert turn.input_start <= turn.output_start.length <= turn.output_end.length
            at = turn.output_end.length
        assert at == session.head.length
        assert [t.status.ended for t in turns] == [True] * session.turn_index + (
            [False] if session.active_turn_id is not None else []
        )


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    async with served("a", "b") as found:
        made, app = found.world, found.app
        built = Target(made, app, found.gateway, found.replica)
        built.bystander = await built.open("bystander", "bystander")
        built.session_id = await built.open("target")
        (await built.turn(built.session_id, "t1")).check()
        session = await built.session(built.session_id)
        assert session is not None
        assert session.owner is not None
        owner = await built.owner(built.session_id)
        other = made.replicas["b" if owner.name == "a" else "a"]
        assert other.ref is not None
        built.serve_replica(owner)
        head = pb.Position(length=session.head.length, digest=session.head.digest)
        ref = pb.ReplicaRef(replica_id=owner.name, incarnation=session.owner.replica.incarnation)
        built.real = {
            "session_id": built.session_id,
            "new turn": {"turn_id": "t2", "resume_from": None, "attach_only": False},
            "old turn": {"turn_id": "t1", "resume_from": head, "messages": None},
            "messages": [pb.Message(role=pb.Message.ROLE_USER, content="Hello")],
            "max_turns": 10,
            "page_size": 10,
            "page_token": None,
            "retention_ms": 1000,
            "at_turn_index": None,
            "request_id": "r2",
            "model": session.model,
            "epoch": pb.Epoch(number=session.epoch.number, nonce=session.epoch.nonce),
            "replica": ref,
            "source": ref,
            "source_endpoint": next(
                r.details.endpoint
                for r in app.fleet.snapshot.replicas
                if r.ref.replica_id == other.name
            ),
            "target": pb.ReplicaRef(replica_id=other.name, incarnation=other.ref.incarnation),
            "tenant": TENANT,
            "up_to": head,
            "precondition": pb.Precondition(head=head, turn_index=session.turn_index),
            "kv_fingerprint": owner.engine.info.kv_fingerprint,
            "replica_id": owner.name,
            "target_replica_id": other.name,
            "role": pb.Message.ROLE_USER,
            "params": pb.SamplingParams(max_tokens=12),
            "default_params": pb.SamplingParams(),
            "timeout_ms": 20_000,
        }
        yield built


def in_a_world(test: Callable[[Target], Awaitable[None]]) -> None:
    """Runs it on a fresh target, in virtual time."""

    async def main() -> None:
        async with target() as made:
            await test(made)

    run(main)


async def attack(made: Target, shots: list[Shot]) -> None:
    for shot in shots:
        answer = await made.fire(shot)
        try:
            answer.check()
        except AssertionError as error:
            tenant, request = shot.fired(made.real)
            text = str(shot.kind.FromString(request))[:3000]
            raise AssertionError(f"{shot.method} of {tenant}: {text}\n{error}") from error
    await made.check_unharmed()


METHODS = [
    pytest.param(name, kinds, id=name) for kinds in (SESSIONS, FLEET, REPLICA) for name in kinds
]


@pytest.mark.parametrize(("method", "methods"), METHODS)
def test_hostile_requests_get_documented_errors_and_harm_nobody(
    method: str, methods: Mapping[str, type[Message]]
) -> None:
    @fuzz(12)
    @given(st.data())
    def fuzzed(data: st.DataObject) -> None:
        own = data.draw(st.lists(shots({method: methods[method]}), min_size=1, max_size=4))
        others = data.draw(st.lists(shots(methods), max_size=2))
        in_a_world(lambda made: attack(made, [*others, *own]))

    fuzzed()


def opening(**fields: Any) -> session_pb2.OpenSessionRequest:
    return session_pb2.OpenSessionRequest(request_id="r9", **fields)


UNUSABLE = {
    "role of the future": opening(messages=[pb.Message(role=77, content="x")]),  # type: ignore[arg-type]
    "temperature": opening(default_params=pb.SamplingParams(temperature=float("nan"))),
    "empty stop": opening(default_params=pb.SamplingParams(stop=[""])),
    "tool's parameters": opening(tools=[pb.ToolDefinition(name="t", parameters_json="[]")]),
}


@pytest.mark.parametrize("request_", UNUSABLE.values(), ids=UNUSABLE)
def test_a_session_that_was_opened_takes_turns(request_: session_pb2.OpenSessionRequest) -> None:
    """What every turn of the session would refuse is refused when it is opened."""

    async def test(made: Target) -> None:
        answer = await made.call("OpenSession", request_)
        answer.check()
        if answer.code is grpc.StatusCode.OK:
            session = session_pb2.OpenSessionResponse.FromString(answer.responses[0]).session
            turn = await made.turn(session.session_id, "t1")
            assert turn.code is grpc.StatusCode.OK, turn

    in_a_world(test)


def test_a_tool_schema_that_is_nested_too_deep_is_an_invalid_request() -> None:
    deep = opening(tools=[pb.ToolDefinition(name="t", parameters_json="[" * 100_000)])

    async def test(made: Target) -> None:
        answer = await made.call("OpenSession", deep)
        if answer.code is grpc.StatusCode.OK:
            session = session_pb2.OpenSessionResponse.FromString(answer.responses[0]).session
            answer = await made.turn(session.session_id, "t1")
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT, answer

    in_a_world(test)


WITHOUT_END: dict[str, Message] = {
    "MigrateSession": fleet_pb2.MigrateSessionRequest(timeout_ms=2**64 - 1),
    "DrainReplica": fleet_pb2.DrainReplicaRequest(timeout_ms=86_400_001),
    "WatchFleet": fleet_pb2.WatchFleetRequest(interval_ms=60_001),
}


@pytest.mark.parametrize(("method", "request_"), WITHOUT_END.items(), ids=WITHOUT_END)
def test_what_would_never_end_is_an_invalid_request(method: str, request_: Message) -> None:
    async def test(made: Target) -> None:
        graft(request_, made.real, {"session_id", "replica_id", "target_replica_id"})
        answer = await made.call(method, request_)
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT, answer
        await made.check_unharmed()

    in_a_world(test)
