"""A server that fails over may lose its last writes. What it lost is detected, and whoever still
holds it writes it back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from statestore.ports import (
    Appended,
    Fenced,
    HeadMismatch,
    Refused,
    SessionWritten,
    TurnBegun,
    TurnEnded,
)
from statestore.records import (
    Epoch,
    Position,
    ReplicaRegistration,
    SessionState,
    StoreLimits,
    TurnStatus,
)
from statestore.redis_store import RedisStore
from tests.support.owners import (
    EMPTY,
    STOP,
    A,
    B,
    Owner,
    check_whole,
    known_turns,
    position_of,
    session_of,
    taken,
)
from tests.support.stores import ANSWERING, Backend, store_on

pytestmark = pytest.mark.anyio


async def test_tokens_lost_in_mid_turn_are_written_back(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun()
    await owner.write(4)
    saved, stored_head = await backend.save(), owner.head
    await owner.write(5, 6)
    await backend.roll_back(saved)
    lost = await owner.write(7)
    assert lost == HeadMismatch(stored_head, owner.epoch)
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[turn], active="t1")
    for _ in range(2):
        assert await store.repair(repair) == Appended(owner.head)
    await check_whole(store, owner)
    assert await owner.write(8, commit=STOP) == Appended(owner.head)
    (turn,) = await known_turns(store)
    assert (turn.result, turn.output_start.length) == (STOP, 3)


async def test_a_whole_turn_and_the_begin_of_the_next_are_written_back(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    await owner.begun("t1")
    saved, stored_head = await backend.save(), owner.head
    await owner.write(4, commit=STOP)
    await owner.begun("t2")
    await owner.write(5)
    before = await known_turns(store)
    await backend.roll_back(saved)
    assert await owner.write(6) == HeadMismatch(stored_head, owner.epoch)
    active = replace(before[1], output_end=owner.head)
    repair = owner.repair(
        stored_head,
        owner.epoch,
        keep=3,
        turns=[before[0], active],
        active="t2",
        turn_index=1,
    )
    assert await store.repair(repair) == Appended(owner.head)
    await check_whole(store, owner)
    assert await known_turns(store) == [before[0], active]
    assert await owner.write(7, commit=STOP) == Appended(owner.head)


async def test_a_lost_grant_is_claimed_again_by_its_owner(
    backend: Backend, store: RedisStore
) -> None:
    first = await Owner.of(store)
    await first.run_turn("t1", [4])
    saved = await backend.save()
    second = await taken(store, first)
    active = await second.begun("t2")
    await backend.roll_back(saved)
    # The old owner is the owner again, for the store. Its work gives way to the newer epoch's.
    stale = await first.begun("t3", [77])
    assert stale.index == 1
    lost = await second.write(5)
    assert isinstance(lost, HeadMismatch)
    assert (lost.stored, lost.stored_epoch) == (first.head, first.epoch)
    repair = second.repair(
        lost.stored, lost.stored_epoch, keep=4, turns=[active], active="t2", turn_index=1
    )
    for _ in range(2):
        assert await store.repair(repair) == Appended(second.head)
    await check_whole(store, second)
    assert [turn.spec.turn_id for turn in await known_turns(store)] == ["t1", "t2"]
    assert await store.get_turn("ses_f", "t3") is None
    assert await first.write(9) == Fenced(second.epoch, B)
    session = await session_of(store, "ses_f")
    assert session.previous_owner == A
    assert await second.write(6, commit=STOP) == Appended(second.head)
    assert await store.sessions_of(B, 10) == ("ses_f",)


async def test_an_idle_session_is_written_back(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    saved = await backend.save()
    await owner.run_turn("t1", [4])
    turns = await known_turns(store)
    await backend.roll_back(saved)
    repair = owner.repair(EMPTY, owner.epoch, keep=0, turns=turns, turn_index=1)
    assert await store.repair(repair) == Appended(owner.head)
    await check_whole(store, owner)
    assert await known_turns(store) == turns
    assert isinstance(await owner.begin("t2"), TurnBegun)


async def test_turns_of_an_abandoned_history_are_forgotten(
    backend: Backend, store: RedisStore
) -> None:
    first = await Owner.of(store)
    await first.run_turn("t1", [4])
    saved = await backend.save()
    second = await taken(store, first)
    await backend.roll_back(saved)
    for turn_id in ("x1", "x2"):
        await first.run_turn(turn_id, [9])
    repair = second.repair(first.head, first.epoch, keep=4, turn_index=1)
    assert await store.repair(repair) == Appended(second.head)
    await check_whole(store, second)
    assert [turn.spec.turn_id for turn in await known_turns(store)] == ["t1"]
    # Their ids are free again.
    second.turn_id = "x1"
    assert isinstance(await second.begin("x1"), TurnBegun)


async def test_a_lost_resume_does_not_stop_its_owner(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    outcome = await store.take("ses_f", owner.epoch, B, b"nonce")
    assert isinstance(outcome, SessionWritten)
    owner.ref, owner.epoch = B, outcome.session.epoch
    saved = await backend.save()
    await store.resume_turn("ses_f", owner.epoch, "t1")
    await backend.roll_back(saved)
    assert await owner.write(4) == Appended(owner.head)
    turn = await store.get_turn("ses_f", "t1")
    assert turn is not None
    assert turn.status is TurnStatus.RUNNING


async def test_a_repair_against_another_state_than_observed_writes_nothing(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun()
    stored_head = owner.head
    saved = await backend.save()
    await owner.write(4)
    await backend.roll_back(saved)
    for observed, epoch in (
        (EMPTY, owner.epoch),
        (Position(3, b"other"), owner.epoch),
        (stored_head, Epoch(owner.epoch.number, b"other")),
    ):
        repair = owner.repair(observed, epoch, keep=3, turns=[turn], active="t1")
        assert await store.repair(repair) == HeadMismatch(stored_head, owner.epoch)
    session = await session_of(store, "ses_f")
    assert session.head == stored_head


async def test_only_the_newest_owner_repairs(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    outcome = await store.take("ses_f", owner.epoch, B, b"nonce")
    assert isinstance(outcome, SessionWritten)
    epoch = outcome.session.epoch
    repair = owner.repair(owner.head, epoch, keep=3)
    assert await store.repair(repair) == Fenced(epoch, B)
    owner.epoch = Epoch(epoch.number, b"twin")
    assert await store.repair(replace(repair, epoch=owner.epoch)) == Fenced(
        epoch, B, data_loss=True
    )


async def test_a_turn_that_ended_stays_ended(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun()
    stored_head = owner.head
    saved = await backend.save()
    await owner.write(4)
    await backend.roll_back(saved)
    cancelled = await store.cancel_turn("ses_f", "t1")
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[turn], active="t1")
    assert await store.repair(repair) == cancelled
    assert isinstance(cancelled, TurnEnded)
    session = await session_of(store, "ses_f")
    assert (session.head, session.active_turn_id) == (stored_head, None)


async def test_a_suspended_session_is_not_repaired(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await store.suspend("ses_f")
    repair = owner.repair(EMPTY, owner.epoch, keep=0)
    assert await store.repair(repair) == Refused(SessionState.SUSPENDED)


async def test_tokens_that_a_fork_refers_to_are_never_replaced(
    backend: Backend, store: RedisStore
) -> None:
    first = await Owner.of(store)
    saved = await backend.save()
    second = await taken(store, first)
    await backend.roll_back(saved)
    await first.run_turn("t1", [4])
    await store.fork("ses_f", "ses_f.c", None, ())
    await first.run_turn("t2", [5])
    diverged = Fenced(first.epoch, A, data_loss=True)
    assert await store.repair(second.repair(first.head, first.epoch, keep=0)) == diverged
    second.tokens = first.tokens[:4]
    repair = second.repair(first.head, first.epoch, keep=4, turn_index=1)
    assert await store.repair(repair) == Appended(second.head)
    child = await Owner.of(store, "ses_f.c")
    assert child.tokens == [1, 2, 3, 4]
    # A fork cannot be cut back into its ancestors' ledgers.
    newer = Owner(store, "ses_f.c", B, Epoch(child.epoch.number + 1, b"newer"))
    assert await store.repair(newer.repair(child.head, child.epoch, keep=0)) == Fenced(
        child.epoch, A, data_loss=True
    )


@ANSWERING
async def test_a_repaired_turn_keeps_its_deadline(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=1))
    owner = await Owner.of(store)
    saved = await backend.save()
    outcome = await owner.begin(timeout_ms=1)
    assert isinstance(outcome, TurnBegun)
    await backend.roll_back(saved)
    repair = owner.repair(EMPTY, owner.epoch, keep=0, turns=[outcome.turn], active="t1")
    assert await store.repair(repair) == Appended(owner.head)
    expired: list[tuple[str, str]] = []
    while not expired:
        expired += (await store.sweep(10)).turns_expired
    assert expired == [("ses_f", "t1")]


async def test_positions_of_a_repair_must_fit_its_tokens(store: RedisStore) -> None:
    owner = await Owner.of(store)
    repair = replace(owner.repair(EMPTY, owner.epoch, keep=0), head=position_of([1]))
    with pytest.raises(ValueError, match="do not add up"):
        await store.repair(repair)


async def test_a_lost_registration_is_written_back_by_the_next_heartbeat(
    backend: Backend, store: RedisStore
) -> None:
    saved = await backend.save()
    ref = await store.register_replica(ReplicaRegistration("r1", '{"k":1}'))
    await backend.roll_back(saved)
    assert await store.heartbeat(ref, 7, "{}") in (0, 7)
    (record,) = await store.fleet()
    assert (record.ref, record.details, record.heartbeat) == (ref, '{"k":1}', 7)


async def test_a_repair_does_not_replace_turns_that_a_fork_inherits(
    backend: Backend, store: RedisStore
) -> None:
    first = await Owner.of(store)
    saved = await backend.save()
    second = await taken(store, first)
    await second.begun("t2", ())
    await second.write(commit=STOP)
    turns = await known_turns(store)
    await backend.roll_back(saved)
    # The same ledger, but another turn, and a fork that has it.
    await first.begun("t1", ())
    await first.write(commit=STOP)
    await store.fork("ses_f", "ses_f.c", None, ())
    child = await session_of(store, "ses_f.c")
    inherited = await store.get_turns(child, 0, 9)
    diverged = Fenced(first.epoch, A, data_loss=True)
    for repaired, index in ((turns, 1), ([], 0)):
        repair = second.repair(EMPTY, first.epoch, keep=0, turns=repaired, turn_index=index)
        assert await store.repair(repair) == diverged
    assert await store.get_turns(child, 0, 9) == inherited


async def test_a_repair_leaves_the_turns_that_are_there_as_they_are(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    saved, stored_head = await backend.save(), owner.head
    (first,) = await known_turns(store)
    await owner.run_turn("t2", [5])
    (_, second) = await known_turns(store)
    await backend.roll_back(saved)
    assert first.result is not None
    said = replace(first, result=replace(first.result, text_end=99, usage=b"other"))
    repair = owner.repair(
        stored_head, owner.epoch, keep=stored_head.length, turns=[said, second], turn_index=2
    )
    assert await store.repair(repair) == Appended(owner.head)
    assert await known_turns(store) == [first, second]
    await check_whole(store, owner)
