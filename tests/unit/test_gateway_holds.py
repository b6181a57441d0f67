"""The hold of a running turn in a move: short without its mover, long enough with it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import anyio
import pytest
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.migration import MoveOptions
from gateway.config import GatewayConfig
from gateway.core.migration import MigrationLimits
from loadtest.simulation.world import SimReplica, World, world
from tests.support.gateway_world import simulated
from workers.service import ReplicaApp

TENANT = "acme"


@dataclass
class Scene:
    """A turn that runs on one of two replicas, followed through gateway g2; g1 moves it."""

    world: World
    session_id: str
    source: SimReplica
    target: SimReplica
    heard_at: list[float] = field(default_factory=list)
    """When messages came."""
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def longest_silence_s(self) -> float:
        return max(later - earlier for earlier, later in pairwise(self.heard_at))

    async def sink(self, message: bytes) -> None:
        events = pb.TurnStream.FromString(message).events
        if any(event.WhichOneof("event") != "waiting" for event in events):
            self.heard_at.append(anyio.current_time())

    async def follow(self) -> None:
        request = pb.RunTurnRequest(session_id=self.session_id, turn_id="t1")
        request.messages.add(role=pb.Message.ROLE_USER, content="Tell me more.")
        request.params.max_tokens, request.params.ignore_eos = 300, True
        await self.world.gateways["g2"].app.turns.run(TENANT, request, 60.0, self.sink)
        self.ended.set()

    async def move(self) -> fleet_pb2.MigrationResult:
        session = await self.world.store.get_session(self.session_id)
        assert session is not None
        options = MoveOptions(self.target.name)
        return await self.world.gateways["g1"].app.migrations.migrate(session, options)


@asynccontextmanager
async def scene(hold_s: float) -> AsyncIterator[Scene]:
    config = GatewayConfig(migration=MigrationLimits(hold_s=hold_s))
    async with world(random.Random(7), gateway_config=config) as made:
        for name in ("a", "b"):
            await made.start_replica(name)
            made.start_gateway({"a": "g1", "b": "g2"}[name])
        await anyio.sleep(2.0)
        request = session_pb2.OpenSessionRequest(request_id="r1")
        opened = await made.gateways["g2"].app.sessions.open(TENANT, request)
        session_id = opened.session.session_id
        built = Scene(made, session_id, made.replicas["a"], made.replicas["b"])
        made.tasks.start_soon(built.follow)
        await anyio.sleep(1.0)
        session = await made.store.get_session(session_id)
        assert session is not None
        assert session.owner is not None
        if session.owner.replica.replica_id == "b":
            built.source, built.target = built.target, built.source
        yield built


def app_of(replica: SimReplica) -> ReplicaApp:
    assert replica.app is not None
    return replica.app


@simulated
async def test_a_turn_whose_mover_dies_goes_on_when_its_short_hold_ends() -> None:
    async with scene(hold_s=0.5) as s:
        source = app_of(s.source)
        hold = source.hand_over

        async def hold_and_kill(
            request: replica_pb2.HandOverRequest,
        ) -> replica_pb2.HandOverResponse:
            answer = await hold(request)
            s.world.kill(s.world.gateways["g1"])
            return answer

        source.hand_over = hold_and_kill  # type: ignore[method-assign]
        s.world.gateways["g1"].process.run(s.world.tasks.start_soon, s.move)
        with anyio.fail_after(20):
            await s.ended.wait()
        assert s.world.gateways["g1"].ended
        assert s.longest_silence_s == pytest.approx(0.5, abs=0.2)


@simulated
async def test_a_hold_is_renewed_while_its_mover_lives() -> None:
    async with scene(hold_s=0.2) as s:
        source, target = app_of(s.source), app_of(s.target)
        hold, fetch = source.hand_over, target.import_session
        heads: list[int] = []

        async def note(request: replica_pb2.HandOverRequest) -> replica_pb2.HandOverResponse:
            answer = await hold(request)
            heads.append(answer.head.length)
            return answer

        async def slow(
            request: replica_pb2.ImportSessionRequest,
        ) -> replica_pb2.ImportSessionResponse:
            await anyio.sleep(1.0 if heads else 0.0)
            return await fetch(request)

        source.hand_over, target.import_session = note, slow  # type: ignore[method-assign]
        result = await s.move()
        assert result.moved
        assert len(heads) >= 9
        assert len(set(heads)) == 1
        with anyio.fail_after(20):
            await s.ended.wait()
        assert s.longest_silence_s == pytest.approx(1.0, abs=0.3)
