"""Turns on an engine that hangs, fails, is full, or cannot take them; and what stays resident."""

from __future__ import annotations

import random

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from statestore.digest import RollingDigest
from statestore.records import NO_EPOCH, Epoch, Position, ReplicaRef, Turn, TurnSpec, TurnStatus
from tests.support.replica_world import SESSION, in_virtual_time, listen, world
from workers.config import TurnLimits
from workers.engines.port import EngineOverloaded
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.engine import SimEngine
from workers.residency import Residency, ResidentSession


@in_virtual_time
async def test_an_engine_that_hangs_gives_its_turns_up_for_resumption() -> None:
    limits = TurnLimits(progress_timeout_s=10)
    async with world(SimConfig(timing=SimTiming(step_ms=100_000)), limits) as w:
        replica = await w.start_owner()
        with pytest.raises(errors.Unavailable) as caught:
            await listen(replica, await w.request(replica))
        assert caught.value.reason == "ENGINE_STALLED"
        assert 10 <= anyio.current_time() < 11
        assert (await w.session()).active_turn_id == "t1"


@in_virtual_time
async def test_a_turn_that_waits_in_the_queue_of_a_busy_engine_is_not_hung() -> None:
    limits = TurnLimits(progress_timeout_s=1)
    config = SimConfig(max_running=1, eos_probability=0, timing=SimTiming(step_ms=100))
    async with world(config, limits) as w:
        replica = await w.start()
        for name in ("ses_aaaaaaaaaaaaaaaa", "ses_bbbbbbbbbbbbbbbb"):
            await w.open(name)
            await w.give(replica, name)
        first = await w.request(replica, params={"max_tokens": 30})
        second = await w.request(replica, session_id="ses_bbbbbbbbbbbbbbbb")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, replica, first)
            await anyio.sleep(0.2)
            heard = await listen(replica, second)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_a_turn_that_can_never_fit_fails_with_the_engines_reason() -> None:
    config = SimConfig(capacity_pages=2, timing=SimTiming(step_ms=10), eos_probability=0)
    async with world(config) as w:
        replica = await w.start_owner()
        heard = await listen(replica, await w.request(replica, "x" * 100))
        assert heard.finished.status == types_pb2.TURN_STATUS_FAILED
        assert heard.finished.reason == types_pb2.FINISH_REASON_ERROR
        assert "page" in heard.finished.error
        assert (await w.session()).active_turn_id is None


@in_virtual_time
async def test_an_accepted_turn_waits_for_a_place_in_a_full_engine() -> None:
    async with world() as w:
        replica = await w.start_owner()
        submit, refusals = replica.engine.submit, 3

        def full(request: object) -> None:
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise EngineOverloaded("full", retry_after_ms=500)
            submit(request)  # type: ignore[arg-type]

        replica.engine.submit = full  # type: ignore[method-assign]
        heard = await listen(replica, await w.request(replica))
        assert len(heard.tokens) == 20
        assert anyio.current_time() > 1.5


@in_virtual_time
async def test_a_failed_engine_ends_the_replica_with_a_good_bye() -> None:
    async with world() as w:
        replica = await w.start_owner()

        async def turn() -> None:
            with pytest.raises(errors.Unavailable):
                await listen(replica, await w.request(replica))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(turn)
            await anyio.sleep(0.05)
            replica.engine._fail(RuntimeError("bad memory"))
        await anyio.sleep(1)
        assert [type(error).__name__ for error in w.failures] == ["EngineFailed"]
        assert (await w.store.fleet())[0].gone


@in_virtual_time
async def test_another_tenant_cannot_attach_to_a_running_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        await listen(replica, request, until=lambda h: len(h.tokens) > 3)
        request.tenant = "other"
        with pytest.raises(errors.NotFound):
            await listen(replica, request)


def engine() -> SimEngine:
    return SimEngine(SimConfig(), lambda: 0.0)


def resident(name: str, tokens: int = 100) -> ResidentSession:
    session = ResidentSession(name, b"s" * 32, RollingDigest(b"s" * 32))
    session.extend(range(tokens))
    return session


def test_block_names_grow_with_the_session_and_are_the_engines() -> None:
    session, draw = resident(SESSION, 0), random.Random(3)
    for _ in range(30):
        session.extend([draw.randrange(256) for _ in range(draw.randrange(40))])
        assert session.block_hashes(engine().info) == engine().block_hashes(
            session.salt, session.tokens
        )
        assert session.head == RollingDigest.of(session.salt, session.tokens).position()


def ended_turn(index: int) -> Turn:
    at = Position(0, b"")
    spec = TurnSpec(f"t{index}", b"", b"", 1000)
    return Turn(spec, index, TurnStatus.COMMITTED, 1, 0, at, at, 0, None)


def test_what_another_epoch_knew_of_ended_turns_does_not_count() -> None:
    session = resident(SESSION)
    session.own(Epoch(1, b"a"), 3)
    session.ended(ended_turn(3))
    session.own(Epoch(1, b"a"), 4)
    assert len(session.recent) == 1
    session.own(Epoch(2, b"b"), 4)
    assert not session.recent
    session.own(NO_EPOCH, 4)


def test_turns_before_one_that_ended_elsewhere_do_not_count() -> None:
    session = resident(SESSION)
    session.own(Epoch(1, b"a"), 3)
    session.ended(ended_turn(3))
    session.own(Epoch(1, b"a"), 5)
    session.ended(ended_turn(5))
    assert [turn.index for turn in session.recent] == [5]


def test_the_least_recently_used_idle_session_is_forgotten_first() -> None:
    ref = ReplicaRef("r1", 1)
    kept = Residency(engine(), ref, max_sessions=3, max_tokens=1000, pin_ttl_s=1.0)
    for name in "abc":
        kept._sessions[name] = resident(name)
    kept.hold("a")
    kept._sessions["d"] = resident("d")
    kept.rest("d")
    assert sorted(kept._sessions) == ["a", "c", "d"]
    kept._sessions["e"] = resident("e", tokens=850)
    kept.rest("e")
    assert sorted(kept._sessions) == ["a", "e"]
