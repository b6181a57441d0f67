"""Interactive turns before batch turns on one replica: who is let in, and who goes first."""

from __future__ import annotations

from itertools import count

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from statestore.records import Turn, TurnStatus
from tests.support.replica_world import (
    TENANT,
    RunningReplica,
    World,
    in_virtual_time,
    listen,
    world,
)
from workers.config import TurnLimits
from workers.engines.sim.config import SimConfig, SimTiming

BATCH, INTERACTIVE = types_pb2.TURN_PRIORITY_BATCH, types_pb2.TURN_PRIORITY_INTERACTIVE
UNSET = types_pb2.TURN_PRIORITY_UNSPECIFIED
TURN_TOKENS = 100
TURN_S = 1.0
"""What one takes that runs."""


def engine(max_running: int, max_queued: int) -> SimConfig:
    return SimConfig(
        max_running=max_running,
        max_queued=max_queued,
        eos_probability=0,
        timing=SimTiming(step_ms=10, decode_token_ms=0),
    )


class Crowd:
    """Turns of as many sessions on one replica, which go on unread."""

    def __init__(self, world: World, replica: RunningReplica) -> None:
        self._world = world
        self._replica = replica
        self._numbers = count()

    async def begin(self, priority: types_pb2.TurnPriority.ValueType, tenant: str = TENANT) -> str:
        """Begins one; its session. Raises Overloaded."""
        session_id = f"ses_{next(self._numbers):016d}"
        await self._world.open(session_id, tenant=tenant)
        await self._world.give(self._replica, session_id)
        request = await self._world.request(
            self._replica,
            session_id=session_id,
            priority=priority,
            params={"max_tokens": TURN_TOKENS},
        )
        request.tenant = tenant
        await listen(self._replica, request, until=lambda h: True)
        return session_id

    async def turn(self, session_id: str) -> Turn:
        return await self._world.turn(session_id=session_id)


@in_virtual_time
async def test_batch_turns_leave_a_share_of_the_queue_to_interactive_ones() -> None:
    async with world(engine(2, 8), TurnLimits(batch_share=0.5)) as w:
        crowd = Crowd(w, await w.start())
        for tenant in "aabbcc":
            await crowd.begin(BATCH, tenant)
        with pytest.raises(errors.Overloaded, match="batch") as caught:
            await crowd.begin(BATCH, "d")
        assert caught.value.retry_after_ms
        for tenant, priority in zip("defg", (INTERACTIVE, UNSET, INTERACTIVE, UNSET), strict=True):
            await crowd.begin(priority, tenant)
        with pytest.raises(errors.Overloaded):
            await crowd.begin(INTERACTIVE, "h")


@in_virtual_time
async def test_a_batch_turn_that_is_refused_leaves_nothing_behind() -> None:
    async with world(engine(1, 2)) as w:
        replica = await w.start()
        crowd = Crowd(w, replica)
        for tenant in "ab":
            await crowd.begin(INTERACTIVE, tenant)
        await w.open()
        await w.give(replica)
        request = await w.request(replica, priority=BATCH)
        with pytest.raises(errors.Overloaded):
            await listen(replica, request)
        session = await w.session()
        assert session.head.length == 0
        assert session.active_turn_id is None
        await anyio.sleep(3 * TURN_S)
        heard = await listen(replica, request)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_a_queue_too_short_to_share_lets_batch_turns_in_that_can_run_at_once() -> None:
    async with world(engine(1, 1)) as w:
        crowd = Crowd(w, await w.start())
        await crowd.begin(BATCH, "a")
        with pytest.raises(errors.Overloaded):
            await crowd.begin(BATCH, "b")
        await crowd.begin(INTERACTIVE, "c")


@in_virtual_time
async def test_interactive_turns_overtake_batch_turns_that_wait() -> None:
    async with world(engine(1, 8)) as w:
        crowd = Crowd(w, await w.start())
        running, waiting = await crowd.begin(BATCH), await crowd.begin(BATCH)
        urgent = await crowd.begin(INTERACTIVE)
        await anyio.sleep(2.5 * TURN_S)
        for session_id in (running, urgent):
            assert (await crowd.turn(session_id)).status is TurnStatus.COMMITTED
        behind = await crowd.turn(waiting)
        assert behind.output_end.length < behind.output_start.length + TURN_TOKENS
        await anyio.sleep(TURN_S)
        assert (await crowd.turn(waiting)).status is TurnStatus.COMMITTED


@in_virtual_time
async def test_a_turn_keeps_its_priority_wherever_it_goes_on_and_whoever_asks_for_it() -> None:
    async with world(engine(1, 8)) as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        request = await w.request(first, priority=BATCH, params={"max_tokens": TURN_TOKENS})
        heard = await listen(first, request, until=lambda h: len(h.tokens) > 5)
        # A repeat of another priority is the same turn.
        request.turn.priority = INTERACTIVE
        again = await listen(first, request, until=lambda h: len(h.tokens) > 5)
        assert again.accepted.attached
        await first.kill()
        crowd = Crowd(w, second)
        running = await crowd.begin(INTERACTIVE)
        await w.give(second)
        request = await w.request(second, "", priority=INTERACTIVE)
        resumed = await listen(second, request, until=lambda h: True)
        assert resumed.accepted.attempt == 2
        before = (await w.turn()).output_end.length
        urgent = await crowd.begin(INTERACTIVE)
        await anyio.sleep(1.5 * TURN_S)
        assert (await crowd.turn(running)).status is TurnStatus.COMMITTED
        ahead = await crowd.turn(urgent)
        assert ahead.output_end.length > ahead.output_start.length
        assert (await w.turn()).output_end.length == before
        await anyio.sleep(2 * TURN_S)
        assert (await w.turn()).status is TurnStatus.COMMITTED
        rest = await listen(second, await w.request(second, ""))
        assert rest.tokens[: len(heard.tokens)] == heard.tokens


@in_virtual_time
async def test_an_accepted_batch_turn_goes_on_where_a_new_one_is_refused() -> None:
    async with world(engine(1, 4)) as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        request = await w.request(first, priority=BATCH, params={"max_tokens": TURN_TOKENS})
        await listen(first, request, until=lambda h: len(h.tokens) > 5)
        await first.kill()
        crowd = Crowd(w, second)
        for tenant in "abc":
            await crowd.begin(INTERACTIVE, tenant)
        with pytest.raises(errors.Overloaded, match="batch"):
            await crowd.begin(BATCH, "d")
        await w.give(second)
        resumed = await listen(second, await w.request(second, "", priority=BATCH))
        assert resumed.accepted.attempt == 2
        assert resumed.finished.status == types_pb2.TURN_STATUS_COMMITTED
