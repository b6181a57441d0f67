"""Replicas against a store that is slow, loses answers or goes away."""

from __future__ import annotations

import random

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from loadtest.simulation.redis import Fault
from statestore.executor import ScriptCall
from tests.support.replica_world import (
    SESSION,
    Heard,
    expected,
    in_virtual_time,
    listen,
    world,
)
from workers.config import TurnLimits
from workers.engines.sim.config import SimConfig, SimTiming


@in_virtual_time
async def test_tokens_are_delivered_only_after_they_are_journalled() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()

        async def compare() -> None:
            if heard.tokens:
                stored = await w.session()
                assert heard.end.length <= stored.head.length

        await listen(replica, await w.request(replica), heard, between=compare)
        assert len(heard.tokens) == 20


@pytest.mark.parametrize("seed", range(8))
def test_lost_requests_and_lost_answers_lose_and_repeat_nothing(seed: int) -> None:
    @in_virtual_time
    async def turn() -> None:
        async with world() as w:
            replica = await w.start_owner()
            draw = random.Random(seed)
            kinds = [Fault.REQUEST_LOST, Fault.REPLY_LOST, Fault.NONE, Fault.NONE]
            request = await w.request(replica)
            w.executor.fault = lambda call: draw.choice(kinds)
            heard = await listen(replica, request)
            w.executor.fault = lambda call: Fault.NONE
            ledger = await w.ledger()
            start = heard.accepted.output_start.length
            assert heard.tokens == ledger[start:] == expected(ledger, start, 20)
            assert (await w.turn()).result is not None

    turn()


@in_virtual_time
async def test_an_outage_parks_the_turn_and_the_stream_says_so() -> None:
    limits = TurnLimits(waiting_interval_s=1.0)
    async with world(limits=limits) as w:
        replica = await w.start_owner()
        heard = Heard()
        down: list[float] = []

        def fault(call: ScriptCall) -> Fault:
            if down and anyio.current_time() < down[0] + 30:
                return Fault.REQUEST_LOST
            return Fault.NONE

        async def cut() -> None:
            if len(heard.tokens) > 5 and not down:
                down.append(anyio.current_time())
                w.executor.fault = fault

        await listen(replica, await w.request(replica), heard, between=cut)
        waits = [e.waiting.reason for e in heard.events if e.HasField("waiting")]
        assert waits
        assert set(waits) == {types_pb2.TurnWaiting.REASON_STORE}
        start = heard.accepted.output_start.length
        assert heard.tokens == (await w.ledger())[start:]
        assert anyio.current_time() > 30


@in_virtual_time
async def test_an_engine_runs_only_so_far_ahead_of_the_journal() -> None:
    limits = TurnLimits(max_unacked_steps=3)
    config = SimConfig(timing=SimTiming(step_ms=10), eos_probability=0)
    async with world(config, limits) as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 1000})
        await listen(replica, request, until=lambda h: len(h.tokens) > 5)
        w.executor.fault = lambda call: Fault.REQUEST_LOST
        await anyio.sleep(0.5)
        run = replica.run()
        ahead = len(run.output.tokens)
        await anyio.sleep(5)
        assert len(run.output.tokens) == ahead
        # The bound, and one for the step that was under way when the engine was told.
        assert ahead - run.released <= 3 + 1
        w.executor.fault = lambda call: Fault.NONE


@in_virtual_time
async def test_an_outage_past_the_deadline_is_reported_as_unavailable() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()

        async def cut() -> None:
            w.executor.fault = lambda call: Fault.REQUEST_LOST

        request = await w.request(replica, timeout_ms=5000)
        with pytest.raises(errors.Unavailable):
            await listen(replica, request, heard, between=cut)
        assert 5 <= anyio.current_time() < 12
        assert replica.app.session_ids() == [SESSION]


@in_virtual_time
async def test_a_replaced_process_stops() -> None:
    async with world() as w:
        await w.start("r1")
        old = w.replicas["r1"]
        await w.start("r1")
        await anyio.sleep(2)
        assert [type(e).__name__ for e in w.failures] == ["ReplicaReplaced"]
        assert w.replicas["r1"].ref.incarnation > old.ref.incarnation


@in_virtual_time
async def test_a_stopped_replica_says_good_bye_and_a_killed_one_does_not() -> None:
    async with world() as w:
        stopped, killed = await w.start("r1"), await w.start("r2")
        stopped.stop.set()
        await killed.kill()
        await anyio.sleep(1)
        assert [(r.ref.replica_id, r.gone) for r in await w.store.fleet()] == [
            ("r1", True),
            ("r2", False),
        ]
