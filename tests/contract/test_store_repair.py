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
    TurnUnknown,
)
from statestore.records import (
    Epoch,
    FinishReason,
    Position,
    ReplicaRegistration,
    SessionState,
    StoreLimits,
    Turn,
    TurnResult,
    TurnStatus,
)
from statestore.records import Owner as Ownership
from statestore.redis_store import RedisStore
from tests.support.owners import (
    EMPTY,
    FINGERPRINT,
    STOP,
    A,
    B,
    Owner,
    position_of,
    session_of,
    taken,
)
from tests.support.stores import ANSWERING, Backend, store_on

pytestmark = pytest.mark.anyio


async def known_turns(store: RedisStore) -> list[Turn]:
    return list(await store.get_turns(await session_of(store, "ses_f"), 0, 100))


async def check(store: RedisStore, owner: Owner) -> None:
    """The session is what the owner says, and it works."""
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.owner == Ownership(owner.ref, owner.epoch)
    assert session.head == owner.head
    assert session.token_fingerprint == FINGERPRINT
    assert await store.read_tokens(session, 0, 1 << 30) == owner.tokens


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
    await check(store, owner)
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
    await check(store, owner)
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
    await check(store, second)
    assert [turn.spec.turn_id for turn in await known_turns(store)] == ["t1", "t2"]
    assert await store.get_turn("ses_f", "t3") is None
    assert await first.write(9) == Fenced(second.epoch, B)
    session = await store.get_session("ses_f")
    assert session is not None
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
    await check(store, owner)
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
    await check(store, second)
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
    session = await store.get_session("ses_f")
    assert session is not None
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
    session = await store.get_session("ses_f")
    assert session is not None
    assert (session.head, session.active_turn_id) == (stored_head, None)


async def cut_short(backend: Backend, owner: Owner) -> tuple[Turn, Position]:
    """A running turn whose last tokens the store has lost: the turn, and where the store has it."""
    turn = await owner.begun()
    await owner.write(4)
    stored_head, saved = owner.head, await backend.save()
    await owner.write(5, 6)
    await backend.roll_back(saved)
    return replace(turn, output_end=owner.head), stored_head


async def test_a_turn_cancelled_short_of_tokens_that_were_lost_gets_them_back(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn, stored_head = await cut_short(backend, owner)
    cancelled = await store.cancel_turn("ses_f", "t1")
    assert isinstance(cancelled, TurnEnded)
    assert cancelled.turn.output_end == stored_head
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[turn], active="t1")
    for _ in range(2):
        assert await store.repair(repair) == TurnEnded(
            replace(cancelled.turn, output_end=owner.head)
        )
    await check(store, owner)
    assert await known_turns(store) == [replace(cancelled.turn, output_end=owner.head)]
    session = await session_of(store, "ses_f")
    assert (session.active_turn_id, session.turn_index) == (None, 1)
    await owner.run_turn("t2", [7])
    await check(store, owner)


@ANSWERING
async def test_a_turn_that_ran_into_its_deadline_short_of_lost_tokens_gets_them_back(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=1))
    owner = await Owner.of(store)
    outcome = await owner.begin(timeout_ms=1)
    assert isinstance(outcome, TurnBegun)
    stored_head = owner.head
    owner.tokens += [4, 5]
    while not (await store.sweep(10)).turns_expired:
        pass
    (ended,) = await known_turns(store)
    turn = replace(outcome.turn, output_end=owner.head)
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[turn], active="t1")
    assert await store.repair(repair) == TurnEnded(replace(ended, output_end=owner.head))
    await check(store, owner)


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
    assert isinstance(await store.cancel_turn("ses_f", "t1"), TurnEnded)
    held = replace(turn, output_end=second.head)
    repair = second.repair(first.head, first.epoch, keep=3, turns=[held], active="t1")
    outcome = await store.repair(repair)
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.output_end == second.head
    await check(store, second)


async def test_an_owner_that_heard_of_the_cancel_lengthens_it_as_well(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    _, stored_head = await cut_short(backend, owner)
    cancelled = await store.cancel_turn("ses_f", "t1")
    assert isinstance(cancelled, TurnEnded)
    longer = replace(cancelled.turn, output_end=owner.head)
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[longer], turn_index=1)
    for _ in range(2):
        assert await store.repair(repair) == Appended(owner.head)
    await check(store, owner)
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
    assert isinstance(await store.cancel_turn("ses_f", "t1"), TurnEnded)
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[committed], turn_index=1)
    for _ in range(2):
        assert await store.repair(repair) == Appended(owner.head)
    await check(store, owner)
    assert await known_turns(store) == [committed]


async def test_a_cancelled_turn_with_other_tokens_is_not_lengthened(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn, stored_head = await cut_short(backend, owner)
    cancelled = await store.cancel_turn("ses_f", "t1")
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[turn], active="t1")
    assert await store.repair(repair) == cancelled
    assert (await session_of(store, "ses_f")).head == stored_head


async def test_what_began_after_a_cancelled_turn_is_not_overwritten(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn, stored_head = await cut_short(backend, owner)
    cancelled = await store.cancel_turn("ses_f", "t1")
    later = Owner(store, "ses_f", owner.ref, owner.epoch)
    later.tokens = owner.tokens[: stored_head.length]
    await later.begun("t2", ())
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[turn], active="t1")
    assert await store.repair(repair) == cancelled
    await later.write(commit=STOP)
    assert await store.repair(repair) == cancelled
    await check(store, later)


async def test_a_fork_keeps_the_end_that_a_cancelled_turn_had(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn, stored_head = await cut_short(backend, owner)
    cancelled = await store.cancel_turn("ses_f", "t1")
    assert isinstance(await store.fork("ses_f", "ses_f.c", None, ()), SessionWritten)
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[turn], active="t1")
    assert await store.repair(repair) == cancelled
    child = await session_of(store, "ses_f.c")
    assert child.head == stored_head
    assert isinstance(cancelled, TurnEnded)
    assert await store.get_turns(child, 0, 9) == (cancelled.turn,)


async def test_a_turn_that_was_committed_is_not_lengthened(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    turn, stored_head = await cut_short(backend, owner)
    shorter = Owner(store, "ses_f", owner.ref, owner.epoch)
    shorter.tokens, shorter.turn_id = owner.tokens[: stored_head.length], "t1"
    assert await shorter.write(commit=STOP) == Appended(stored_head)
    repair = owner.repair(stored_head, owner.epoch, keep=4, turns=[turn], active="t1")
    assert isinstance(await store.repair(repair), TurnEnded)
    await check(store, shorter)


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
    await check(store, owner)
    session = await session_of(store, "ses_f")
    assert (session.active_turn_id, session.turn_index) == (None, 1)
    assert isinstance(await owner.begin("t2"), TurnBegun)


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
async def test_a_turn_whose_cancel_was_lost_before_its_deadline_is_cancelled_again(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=1))
    owner = await Owner.of(store)
    outcome = await owner.begin(timeout_ms=1)
    assert isinstance(outcome, TurnBegun)
    stored_head = owner.head
    owner.tokens += [4, 5]
    while not (await store.sweep(10)).turns_expired:
        pass
    result = TurnResult(TurnStatus.CANCELLED, FinishReason.CANCELLED)
    held = replace(outcome.turn, status=TurnStatus.CANCELLED, output_end=owner.head, result=result)
    repair = owner.repair(stored_head, owner.epoch, keep=3, turns=[held], turn_index=1)
    assert await store.repair(repair) == Appended(owner.head)
    assert await known_turns(store) == [held]
    await check(store, owner)


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
    await check(store, owner)
