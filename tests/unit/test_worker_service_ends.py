"""Ends of turns other than a commit: cancels, deadlines, closed sessions, poison."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from sessile.v1 import replica_pb2, types_pb2

from gateway.core import errors
from statestore.ports import TurnEnded
from statestore.records import TurnStatus
from tests.support.replica_world import (
    SESSION,
    TENANT,
    Heard,
    RunningReplica,
    World,
    in_virtual_time,
    listen,
    world,
)
from workers.config import TurnLimits
from workers.engines.sim.config import SimConfig, SimTiming


@in_virtual_time
async def test_a_cancel_ends_the_stream_where_the_ledger_stands() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()

        async def cancel() -> None:
            if len(heard.tokens) > 5:
                await w.store.cancel_turn(SESSION, "t1")
                await replica.app.stop_turn(
                    replica_pb2.StopTurnRequest(session_id=SESSION, turn_id="t1")
                )

        await listen(replica, await w.request(replica), heard, between=cancel)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert heard.finished.end.length == (await w.session()).head.length
        start = heard.accepted.output_start.length
        assert heard.tokens == (await w.ledger())[start:]
        assert heard.finished.text_end == len(heard.text)
        after = await listen(replica, await w.request(replica, "Next", "t2"))
        assert after.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_a_cancel_before_the_begin_leaves_a_tombstone() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await w.store.cancel_turn(SESSION, "t1")
        with pytest.raises(errors.TurnCancelled):
            await listen(replica, await w.request(replica))


@in_virtual_time
async def test_a_cancel_after_the_commit_changes_nothing() -> None:
    async with world() as w:
        replica = await w.start_owner()
        live = await listen(replica, await w.request(replica))
        outcome = await w.store.cancel_turn(SESSION, "t1")
        assert isinstance(outcome, TurnEnded)
        assert outcome.turn.status is TurnStatus.COMMITTED
        assert (await listen(replica, await w.request(replica))).finished == live.finished


@in_virtual_time
async def test_a_turn_past_its_deadline_fails_with_what_it_has() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 1000}, timeout_ms=300)
        heard = await listen(replica, request)
        assert heard.finished.status == types_pb2.TURN_STATUS_FAILED
        assert heard.finished.reason == types_pb2.FINISH_REASON_DEADLINE
        start = heard.accepted.output_start.length
        assert heard.tokens
        assert heard.tokens == (await w.ledger())[start:]
        assert anyio.current_time() < 0.4


@in_virtual_time
async def test_a_turn_nobody_listens_to_ends_after_its_grace() -> None:
    limits = TurnLimits(detach_grace_s=2.0)
    async with world(limits=limits) as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 5000})
        await listen(replica, request, until=lambda h: len(h.tokens) > 3)
        await anyio.sleep(3)
        turn = await w.turn()
        assert turn.status is TurnStatus.CANCELLED
        assert replica.app.load().queued_turns == 0


@in_virtual_time
async def test_a_closed_session_ends_its_run() -> None:
    async with world() as w:
        replica = await w.start_owner()
        session = await w.session()
        heard = Heard()

        async def close() -> None:
            if len(heard.tokens) > 5:
                await w.store.close(session.session_id, None)
                await replica.app.release_session(
                    replica_pb2.ReleaseSessionRequest(
                        session_id=session.session_id,
                        epoch=types_pb2.Epoch(
                            number=session.epoch.number, nonce=session.epoch.nonce
                        ),
                        drop_kv=True,
                    )
                )

        await listen(replica, await w.request(replica), heard, between=close)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert replica.app.session_ids() == []
        await anyio.sleep(1)  # a step that is under way still holds its pages
        load = replica.engine.load()
        assert load.free_pages == replica.engine.info.capacity_pages
        assert load.pinned_pages == 0
        with pytest.raises(errors.SessionClosed):
            await listen(replica, await w.request(replica, "Next", "t2"))


@pytest.mark.parametrize("heard_tokens", range(1, 20, 3))
def test_nothing_stays_of_tokens_that_never_reached_the_ledger(heard_tokens: int) -> None:
    @in_virtual_time
    async def cancelled() -> None:
        # A slow store lets the engine run ahead of the ledger.
        async with world(delay_s=0.03) as w:
            replica = await w.start_owner()
            session = await w.session()
            heard = Heard()

            async def cancel() -> None:
                if len(heard.tokens) >= heard_tokens:
                    await w.store.cancel_turn(SESSION, "t1")

            request = await w.request(replica, params={"max_tokens": 100})
            await listen(replica, request, heard, between=cancel)
            await anyio.sleep(1)
            epoch = types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce)
            await replica.app.release_session(
                replica_pb2.ReleaseSessionRequest(session_id=SESSION, epoch=epoch, drop_kv=True)
            )
            salt = await w.store.tenant_salt(TENANT)
            pages = replica.engine.block_hashes(salt, await w.ledger())
            assert pages
            assert replica.engine.resident_pages(pages) == 0

    cancelled()


@in_virtual_time
async def test_a_poison_turn_fails_after_two_attempts_without_progress() -> None:
    async with poisoned() as (w, last):
        heard = await listen(last, await w.request(last))
        assert heard.finished.status == types_pb2.TURN_STATUS_FAILED
        assert "attempts" in heard.finished.error


@in_virtual_time
async def test_an_end_that_a_resume_wrote_is_put_back_if_the_store_loses_it() -> None:
    async with poisoned() as (w, last):
        await anyio.sleep(1.5)
        kept = w.executor.snapshot()
        heard = await listen(last, await w.request(last))
        await anyio.sleep(1.5)
        w.executor.restore(kept)
        assert (await w.turn()).status is TurnStatus.INTERRUPTED
        await anyio.sleep(1.5)
        turn = await w.turn()
        assert turn.status is TurnStatus.FAILED
        assert turn.result is not None
        assert turn.result.error == heard.finished.error


@asynccontextmanager
async def poisoned() -> AsyncIterator[tuple[World, RunningReplica]]:
    """A turn that took two replicas with it before its first token, and the third."""
    config = SimConfig(timing=SimTiming(step_ms=1000))
    async with world(config) as w:
        await w.open()
        for name in ("r1", "r2"):
            replica = await w.start(name)
            await w.give(replica)
            request = await w.request(replica)
            heard = await listen(replica, request, until=lambda h: True)
            assert not heard.tokens
            await replica.kill()
        last = await w.start("r3")
        await w.give(last)
        yield w, last
