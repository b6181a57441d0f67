"""A turn that was cancelled, or ran into its deadline, while the store had lost some of it: its
owner puts back what it said, and the turn stays ended."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from statestore.ports import Appended, Repair, SessionWritten, TurnBegun, TurnEnded, TurnUnknown
from statestore.records import FinishReason, Position, StoreLimits, Turn, TurnResult, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.owners import (
    EMPTY,
    STOP,
    Owner,
    check_whole,
    known_turns,
    session_of,
    taken,
)
from tests.support.stores import ANSWERING, Backend, store_on

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class CutShort:
    """A turn t1 of which the store has lost the last tokens."""

    owner: Owner
    held: Turn
    """As its owner has it."""
    stored_head: Position

    def repair(self, keep: int = 4) -> Repair:
        return self.owner.repair(
            self.stored_head, self.owner.epoch, keep=keep, turns=[self.held], active="t1"
        )


async def cut_short(backend: Backend, store: RedisStore) -> CutShort:
    owner = await Owner.of(store)
    turn = await owner.begun()
    await owner.write(4)
    stored_head, saved = owner.head, await backend.save()
    await owner.write(5, 6)
    await backend.roll_back(saved)
    return CutShort(owner, replace(turn, output_end=owner.head), stored_head)


async def overdue(store: RedisStore) -> CutShort:
    """Its deadline ended the turn meanwhile."""
    owner = await Owner.of(store)
    outcome = await owner.begin(timeout_ms=1)
    assert isinstance(outcome, TurnBegun)
    stored_head = owner.head
    owner.tokens += [4, 5]
    while not (await store.sweep(10)).turns_expired:
        pass
    return CutShort(owner, replace(outcome.turn, output_end=owner.head), stored_head)


async def cancel(store: RedisStore) -> TurnEnded:
    cancelled = await store.cancel_turn("ses_f", "t1")
    assert isinstance(cancelled, TurnEnded)
    return cancelled


async def test_a_turn_cancelled_short_of_tokens_that_were_lost_gets_them_back(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    cancelled = await cancel(store)
    assert cancelled.turn.output_end == it.stored_head
    longer = replace(cancelled.turn, output_end=it.owner.head)
    for _ in range(2):
        assert await store.repair(it.repair()) == TurnEnded(longer)
    await check_whole(store, it.owner)
    assert await known_turns(store) == [longer]
    session = await session_of(store, "ses_f")
    assert (session.active_turn_id, session.turn_index) == (None, 1)
    await it.owner.run_turn("t2", [7])
    await check_whole(store, it.owner)


@ANSWERING
async def test_a_turn_that_ran_into_its_deadline_short_of_lost_tokens_gets_them_back(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=1))
    it = await overdue(store)
    (ended,) = await known_turns(store)
    assert await store.repair(it.repair(keep=3)) == TurnEnded(
        replace(ended, output_end=it.owner.head)
    )
    await check_whole(store, it.owner)


@ANSWERING
async def test_a_turn_whose_cancel_was_lost_before_its_deadline_is_cancelled_again(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=1))
    it = await overdue(store)
    result = TurnResult(TurnStatus.CANCELLED, FinishReason.CANCELLED)
    held = replace(it.held, status=TurnStatus.CANCELLED, result=result)
    repair = replace(it.repair(keep=3), turns=(held,), active_turn_id=None, turn_index=1)
    assert await store.repair(repair) == Appended(it.owner.head)
    assert await known_turns(store) == [held]
    await check_whole(store, it.owner)


async def test_the_newest_owner_lengthens_a_cancelled_turn_though_its_grant_was_lost(
    backend: Backend, store: RedisStore
) -> None:
    first = await Owner.of(store)
    turn = await first.begun()
    saved = await backend.save()
    second = await taken(store, first)
    await store.resume_turn("ses_f", second.epoch, "t1")
    await second.write(4)
    await backend.roll_back(saved)
    await cancel(store)
    held = replace(turn, output_end=second.head)
    repair = second.repair(first.head, first.epoch, keep=3, turns=[held], active="t1")
    outcome = await store.repair(repair)
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.output_end == second.head
    await check_whole(store, second)


async def test_an_owner_that_heard_of_the_cancel_lengthens_it_as_well(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    longer = replace((await cancel(store)).turn, output_end=it.owner.head)
    repair = replace(it.repair(), turns=(longer,), active_turn_id=None, turn_index=1)
    for _ in range(2):
        assert await store.repair(repair) == Appended(it.owner.head)
    await check_whole(store, it.owner)
    assert await known_turns(store) == [longer]


async def test_a_turn_whose_commit_was_lost_before_it_was_cancelled_is_committed_again(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    stored_head, saved = owner.head, await backend.save()
    await owner.write(4, 5, commit=STOP)
    (committed,) = await known_turns(store)
    await backend.roll_back(saved)
    await cancel(store)
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[committed], turn_index=1)
    for _ in range(2):
        assert await store.repair(repair) == Appended(owner.head)
    await check_whole(store, owner)
    assert await known_turns(store) == [committed]


async def test_a_cancelled_turn_with_other_tokens_is_not_lengthened(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    cancelled = await cancel(store)
    assert await store.repair(it.repair(keep=3)) == cancelled
    assert (await session_of(store, "ses_f")).head == it.stored_head


async def test_what_began_after_a_cancelled_turn_is_not_overwritten(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    cancelled = await cancel(store)
    later = Owner(store, "ses_f", it.owner.ref, it.owner.epoch)
    later.tokens = it.owner.tokens[: it.stored_head.length]
    await later.begun("t2", ())
    assert await store.repair(it.repair()) == cancelled
    await later.write(commit=STOP)
    assert await store.repair(it.repair()) == cancelled
    await check_whole(store, later)


async def test_a_fork_keeps_the_end_that_a_cancelled_turn_had(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    cancelled = await cancel(store)
    assert isinstance(await store.fork("ses_f", "ses_f.c", None, ()), SessionWritten)
    assert await store.repair(it.repair()) == cancelled
    child = await session_of(store, "ses_f.c")
    assert child.head == it.stored_head
    assert await store.get_turns(child, 0, 9) == (cancelled.turn,)


async def test_a_turn_that_was_committed_is_not_lengthened(
    backend: Backend, store: RedisStore
) -> None:
    it = await cut_short(backend, store)
    shorter = Owner(store, "ses_f", it.owner.ref, it.owner.epoch)
    shorter.tokens, shorter.turn_id = it.owner.tokens[: it.stored_head.length], "t1"
    assert await shorter.write(commit=STOP) == Appended(it.stored_head)
    assert isinstance(await store.repair(it.repair()), TurnEnded)
    await check_whole(store, shorter)


async def test_a_cancel_of_a_turn_whose_begin_was_lost_ends_it_when_it_is_back(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    saved = await backend.save()
    turn = await owner.begun()
    await owner.write(4)
    await backend.roll_back(saved)
    assert await store.cancel_turn("ses_f", "t1") == TurnUnknown()
    held = replace(turn, output_end=owner.head)
    repair = owner.repair(EMPTY, owner.epoch, keep=0, turns=[held], active="t1")
    for _ in range(2):
        outcome = await store.repair(repair)
        assert isinstance(outcome, TurnEnded)
        assert (outcome.turn.status, outcome.turn.output_end) == (TurnStatus.CANCELLED, owner.head)
    await check_whole(store, owner)
    session = await session_of(store, "ses_f")
    assert (session.active_turn_id, session.turn_index) == (None, 1)
    assert isinstance(await owner.begin("t2"), TurnBegun)
