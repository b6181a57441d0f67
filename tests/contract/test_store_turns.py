"""Beginning, journalling, committing, cancelling and resuming turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from statestore.ports import (
    Append,
    Appended,
    EpochLost,
    Fenced,
    HeadMismatch,
    LimitReached,
    Refused,
    SessionWritten,
    TurnBegun,
    TurnConflict,
    TurnEnded,
    TurnExists,
    TurnInProgress,
    TurnResumed,
    TurnTombstoned,
    TurnUnknown,
)
from statestore.records import (
    Epoch,
    FinishReason,
    SessionState,
    StoreLimits,
    Turn,
    TurnResult,
    TurnStatus,
)
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
    spec,
    taken,
)
from tests.support.stores import ANSWERING, Backend, store_on

pytestmark = pytest.mark.anyio


async def stored(store: RedisStore, turn_id: str = "t1") -> Turn:
    turn = await store.get_turn("ses_f", turn_id)
    assert turn is not None
    return turn


async def ledger(store: RedisStore) -> list[int]:
    session = await store.get_session("ses_f")
    assert session is not None
    return await store.read_tokens(session, 0, 1 << 30)


async def test_a_begun_turn_is_in_the_ledger_with_all_that_continues_it(store: RedisStore) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun("t1", [1, 2, 2**32 - 1])
    assert turn == await stored(store)
    assert turn.spec == spec()
    assert (turn.index, turn.attempt, turn.status) == (0, 1, TurnStatus.RUNNING)
    assert (turn.input_start, turn.output_start, turn.output_end) == (0, owner.head, owner.head)
    assert (turn.result, turn.attempt_replica) == (None, A)
    session = await store.get_session("ses_f")
    assert session is not None
    assert (session.active_turn_id, session.head) == ("t1", owner.head)
    assert session.token_fingerprint == FINGERPRINT
    assert turn.deadline_at_ms == session.updated_at_ms + turn.spec.timeout_ms
    assert await ledger(store) == [1, 2, 2**32 - 1]


async def test_an_appended_step_is_in_the_ledger(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    assert await owner.write(4) == Appended(owner.head)
    assert await owner.write(5, 6) == Appended(owner.head)
    assert await ledger(store) == [1, 2, 3, 4, 5, 6]
    assert (await stored(store)).output_end == owner.head


async def test_the_last_append_commits_the_turn(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    assert await owner.write(4, commit=STOP) == Appended(owner.head)
    turn = await stored(store)
    assert (turn.status, turn.result, turn.output_end) == (TurnStatus.COMMITTED, STOP, owner.head)
    session = await store.get_session("ses_f")
    assert session is not None
    assert (session.active_turn_id, session.turn_index) == (None, 1)


async def test_a_commit_needs_no_tokens(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    failed = TurnResult(TurnStatus.FAILED, FinishReason.ERROR, error="engine broke")
    assert await owner.write(commit=failed) == Appended(owner.head)
    assert (await stored(store)).result == failed


async def test_turns_follow_one_another_and_read_back_by_index(store: RedisStore) -> None:
    owner = await Owner.of(store)
    for name in ("t1", "t:2", "t1:status"):
        await owner.run_turn(name, [7, 8])
    await owner.begun("t4")
    turns = await store.get_turns(await session_of(store, "ses_f"), 0, 10)
    assert [turn.spec.turn_id for turn in turns] == ["t1", "t:2", "t1:status", "t4"]
    assert [turn.index for turn in turns] == [0, 1, 2, 3]
    assert [turn.input_start for turn in turns] == [0, 5, 10, 15]
    assert turns[-1].output_end == owner.head
    assert await store.get_turns(await session_of(store, "ses_f"), 1, 2) == turns[1:3]
    assert await store.get_turns(await session_of(store, "ses_f"), 4, 10) == ()
    assert await store.get_turn("ses_f", "unknown") is None


async def test_appends_of_one_group_commit_are_answered_each_by_itself(store: RedisStore) -> None:
    one, two, three = [await Owner.of(store, f"ses_{name}") for name in "abc"]
    for owner in (one, two, three):
        await owner.begun()
    lost = replace(two.append(9), session_id="ses_missing")
    stale = replace(three.append(9), epoch=Epoch(1, b"old"))
    outcomes = await store.append_many([lost, one.append(9), stale])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Missing", "Appended", "Fenced"]
    assert await store.append_many([]) == []


# -- repeats ----------------------------------------------------------------------------------


async def test_a_repeated_begin_finds_the_turn(store: RedisStore) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun()
    await owner.write(4)
    again = await store.begin_turn(
        "ses_f", owner.epoch, EMPTY, spec(), [1], position_of([1]), token_fingerprint=FINGERPRINT
    )
    assert isinstance(again, TurnExists)
    assert again.turn.spec == turn.spec
    assert again.turn.output_end == owner.head
    assert await ledger(store) == [1, 2, 3, 4]


async def test_a_repeated_begin_of_an_ended_turn_needs_no_ownership(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    stranger = Owner(store, "ses_f", B, Epoch(1, b"none"))
    outcome = await stranger.begin()
    assert isinstance(outcome, TurnExists)
    assert outcome.turn.result == STOP


async def test_a_turn_id_cannot_be_used_for_other_input(store: RedisStore) -> None:
    owner = await Owner.of(store)
    turn = await owner.begun()
    outcome = await store.begin_turn(
        "ses_f",
        owner.epoch,
        owner.head,
        spec(digest=b"other"),
        [],
        owner.head,
        token_fingerprint=FINGERPRINT,
    )
    assert outcome == TurnConflict(turn)


@pytest.mark.parametrize("commit", [None, STOP])
async def test_a_repeated_append_is_applied_once(
    store: RedisStore, commit: TurnResult | None
) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    append = owner.append(4, 5, commit=commit)
    for _ in range(3):
        assert await store.append_many([append]) == [Appended(owner.head)]
    assert await ledger(store) == [1, 2, 3, 4, 5]
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.turn_index == (1 if commit else 0)


async def test_a_commit_repeated_after_the_next_turn_began_is_a_success(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    commit = owner.append(4, commit=STOP)
    await store.append_many([commit])
    await owner.begun("t2")
    assert await store.append_many([commit]) == [Appended(commit.head)]


async def test_another_commit_of_a_committed_turn_is_no_repeat(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    commit = owner.append(4, commit=STOP)
    await store.append_many([commit])
    other = replace(commit, tokens=[5], head=position_of([1, 2, 3, 5]))
    (outcome,) = await store.append_many([other])
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.output_end == commit.head


async def test_a_commit_completes_tokens_that_are_there_already(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    append = owner.append(4)
    await store.append_many([append])
    assert await store.append_many([replace(append, commit=STOP)]) == [Appended(append.head)]
    assert (await stored(store)).status is TurnStatus.COMMITTED


# -- refusals ---------------------------------------------------------------------------------


async def test_one_turn_runs_at_a_time(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    assert await owner.begin("t2") == TurnInProgress("t1")


async def test_a_begin_at_another_head_writes_nothing(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    head = owner.head
    for tokens in ([1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 4, 5]):
        owner.tokens = tokens
        assert await owner.begin("t2") == HeadMismatch(head, owner.epoch)
    assert await ledger(store) == [1, 2, 3, 4]


async def test_an_append_at_another_head_writes_nothing(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    head = owner.head
    for tokens in ([1, 2], [1, 2, 4], [1, 2, 3, 4]):
        owner.tokens = tokens
        assert await owner.write(9) == HeadMismatch(head, owner.epoch)
    assert await ledger(store) == [1, 2, 3]


async def test_an_append_to_an_unknown_turn_is_told_so(store: RedisStore) -> None:
    owner = await Owner.of(store)
    owner.turn_id = "t1"
    assert await owner.write(9) == TurnUnknown()


async def test_a_turn_of_another_tokenizer_is_refused(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    outcome = await store.begin_turn(
        "ses_f", owner.epoch, owner.head, spec("t2"), [], owner.head, token_fingerprint=b"other"
    )
    assert outcome == Refused(SessionState.OPEN)


async def test_a_session_has_a_bounded_number_of_turns(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_turns_per_session=2))
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await owner.run_turn("t2", [4])
    assert isinstance(await owner.begin("t3"), LimitReached)


async def test_an_append_is_bounded(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_append_tokens=3))
    owner = await Owner.of(store)
    assert isinstance(await owner.begin("t1", [1, 2, 3, 4]), LimitReached)
    await owner.begun()
    with pytest.raises(ValueError, match="too many"):
        await owner.write(1, 2, 3, 4)


async def test_positions_must_fit_the_tokens(store: RedisStore) -> None:
    append = Append("ses_f", Epoch(1, b""), "t1", EMPTY, [1], EMPTY)
    with pytest.raises(ValueError, match="do not end at"):
        await store.append_many([append])


# -- fencing ----------------------------------------------------------------------------------


async def test_an_owner_that_lost_the_session_is_fenced(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    successor = await taken(store, owner)
    fenced = Fenced(successor.epoch, B)
    assert await owner.write(4) == fenced
    assert await owner.write(commit=STOP) == fenced
    assert await owner.begin("t2") == fenced
    assert await owner.begin("t1") == fenced
    assert await store.resume_turn("ses_f", owner.epoch, "t1") == fenced
    assert await ledger(store) == [1, 2, 3]


async def test_the_twin_of_an_epoch_is_told_that_data_was_lost(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    owner.epoch, real = Epoch(owner.epoch.number, b"twin"), owner.epoch
    assert await owner.write(4) == Fenced(real, A, data_loss=True)
    assert await owner.begin("t2") == Fenced(real, A, data_loss=True)


async def test_a_writer_with_a_newer_epoch_than_the_stored_one_may_repair(
    store: RedisStore,
) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    head = owner.head
    real, owner.epoch = owner.epoch, Epoch(owner.epoch.number + 1, b"newer")
    assert await owner.write(4) == HeadMismatch(head, real)
    assert await owner.begin("t2") == HeadMismatch(head, real)


# -- attempts ---------------------------------------------------------------------------------


async def test_a_taken_turn_is_interrupted_and_resumes_as_a_new_attempt(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await owner.write(4)
    successor = await taken(store, owner)
    assert (await stored(store)).status is TurnStatus.INTERRUPTED
    outcome = await store.resume_turn("ses_f", successor.epoch, "t1")
    assert isinstance(outcome, TurnResumed)
    assert (outcome.turn.status, outcome.turn.attempt) == (TurnStatus.RUNNING, 2)
    assert outcome.turn.attempt_replica == B
    assert (outcome.turn.output_start.length, outcome.turn.output_end) == (3, successor.head)
    assert await successor.write(5, commit=STOP) == Appended(successor.head)
    assert await ledger(store) == [1, 2, 3, 4, 5]


async def test_attempts_that_add_nothing_end_the_turn(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    owner = await taken(store, owner, b"1")
    assert isinstance(await store.resume_turn("ses_f", owner.epoch, "t1"), TurnResumed)
    owner = await taken(store, owner, b"2")
    outcome = await store.resume_turn("ses_f", owner.epoch, "t1")
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.status is TurnStatus.FAILED
    assert outcome.turn.result is not None
    assert outcome.turn.result.reason is FinishReason.ERROR
    assert "no token" in outcome.turn.result.error
    assert isinstance(await owner.begin("t2"), TurnBegun)


async def test_progress_lets_a_turn_be_attempted_further(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    for attempt in range(2, 6):
        await owner.write(attempt)
        owner = await taken(store, owner, b"%d" % attempt)
        outcome = await store.resume_turn("ses_f", owner.epoch, "t1")
        assert isinstance(outcome, TurnResumed)
        assert outcome.turn.attempt == attempt


async def test_only_attempts_in_a_row_count(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    for attempt in range(2, 8):
        owner = await taken(store, owner, b"%d" % attempt)
        assert isinstance(await store.resume_turn("ses_f", owner.epoch, "t1"), TurnResumed)
        if attempt % 2 == 0:
            await owner.write(attempt)


async def test_an_owner_may_start_its_own_attempt_again(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    for attempt in range(2, 6):
        outcome = await store.resume_turn("ses_f", owner.epoch, "t1")
        assert isinstance(outcome, TurnResumed)
        assert outcome.turn.attempt == attempt


async def test_an_ended_or_unknown_turn_is_not_resumed(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    outcome = await store.resume_turn("ses_f", Epoch(1, b"any"), "t1")
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.result == STOP
    assert await store.resume_turn("ses_f", owner.epoch, "t2") == TurnUnknown()


# -- cancel and deadline ----------------------------------------------------------------------


async def test_a_cancelled_turn_ends_where_the_ledger_stands(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await owner.write(4)
    head = owner.head
    outcome = await store.cancel_turn("ses_f", "t1")
    assert isinstance(outcome, TurnEnded)
    assert (outcome.turn.status, outcome.turn.output_end) == (TurnStatus.CANCELLED, head)
    assert await store.cancel_turn("ses_f", "t1") == outcome
    assert await owner.write(5) == outcome
    assert await owner.write(commit=STOP) == outcome
    assert await ledger(store) == [1, 2, 3, 4]
    owner.tokens = [1, 2, 3, 4]
    assert isinstance(await owner.begin("t2"), TurnBegun)


async def test_a_committed_turn_stays_committed(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    outcome = await store.cancel_turn("ses_f", "t1")
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.result == STOP


async def test_an_interrupted_turn_can_be_cancelled(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    successor = await taken(store, owner)
    assert isinstance(await store.cancel_turn("ses_f", "t1"), TurnEnded)
    outcome = await store.resume_turn("ses_f", successor.epoch, "t1")
    assert isinstance(outcome, TurnEnded)


async def test_a_turn_cancelled_before_it_begins_does_not_begin(store: RedisStore) -> None:
    owner = await Owner.of(store)
    assert await store.cancel_turn("ses_f", "t1") == TurnUnknown()
    assert await store.cancel_turn("ses_f", "t1") == TurnUnknown()
    assert await owner.begin("t1") == TurnTombstoned()
    assert isinstance(await owner.begin("t2"), TurnBegun)


async def test_a_tombstone_is_forgotten_after_its_time(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(tombstone_ttl_ms=0))
    owner = await Owner.of(store)
    await store.cancel_turn("ses_f", "t1")
    assert isinstance(await owner.begin("t1"), TurnBegun)


async def test_the_oldest_tombstone_makes_room_at_the_bound(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_tombstones=2))
    owner = await Owner.of(store)
    for turn_id in ("t1", "t2", "t3"):
        await store.cancel_turn("ses_f", turn_id)
    assert await owner.begin("t2") == TurnTombstoned()
    assert await owner.begin("t3") == TurnTombstoned()
    assert isinstance(await owner.begin("t1"), TurnBegun)


async def overdue(store: RedisStore) -> Owner:
    owner = await Owner.of(store)
    outcome = await owner.begin(timeout_ms=0)
    assert isinstance(outcome, TurnBegun)
    return owner


@ANSWERING
async def test_whoever_touches_an_overdue_turn_ends_it(store: RedisStore) -> None:
    owner = await overdue(store)
    ended = await owner.write(4)
    assert isinstance(ended, TurnEnded)
    assert ended.turn.status is TurnStatus.FAILED
    assert ended.turn.result is not None
    assert ended.turn.result.reason is FinishReason.DEADLINE
    assert ended.turn.output_end == position_of([1, 2, 3])
    assert await store.resume_turn("ses_f", owner.epoch, "t1") == ended
    assert await store.cancel_turn("ses_f", "t1") == ended


@ANSWERING
async def test_an_overdue_turn_is_not_cancelled_but_failed(store: RedisStore) -> None:
    await overdue(store)
    outcome = await store.cancel_turn("ses_f", "t1")
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.status is TurnStatus.FAILED


@ANSWERING
async def test_an_overdue_turn_ends_when_its_session_is_taken(store: RedisStore) -> None:
    owner = await overdue(store)
    await taken(store, owner)
    assert (await stored(store)).status is TurnStatus.FAILED


@ANSWERING
async def test_an_overdue_turn_ends_when_it_is_resumed_or_begun_again(store: RedisStore) -> None:
    owner = await overdue(store)
    outcome = await owner.begin(timeout_ms=0)
    assert isinstance(outcome, TurnExists)
    assert outcome.turn.status is TurnStatus.FAILED
    owner = await Owner.of(store, "ses_g")
    await owner.begin(timeout_ms=0)
    assert isinstance(await store.resume_turn("ses_g", owner.epoch, "t1"), TurnEnded)


@ANSWERING
async def test_input_rendered_while_an_overdue_turn_ran_has_to_be_rendered_anew(
    store: RedisStore,
) -> None:
    owner = await overdue(store)
    assert await owner.begin("t2") == TurnInProgress("t1")
    assert isinstance(await owner.begin("t2"), TurnBegun)


@ANSWERING
async def test_an_overdue_turn_does_not_keep_its_session_busy(store: RedisStore) -> None:
    await overdue(store)
    assert isinstance(await store.suspend("ses_f"), SessionWritten)
    assert (await stored(store)).status is TurnStatus.FAILED


@ANSWERING
async def test_the_sweep_ends_overdue_turns_that_nobody_touches(store: RedisStore) -> None:
    await overdue(store)
    other = await Owner.of(store, "ses_g")
    await other.begun()
    report = await store.sweep(10)
    assert report.turns_expired == (("ses_f", "t1"),)
    assert report.examined == 1
    assert (await stored(store)).status is TurnStatus.FAILED
    assert (await store.sweep(10)).examined == 0


@ANSWERING
async def test_the_sweep_looks_at_a_bounded_number_of_sessions(store: RedisStore) -> None:
    for name in "abc":
        owner = await Owner.of(store, f"ses_{name}")
        await owner.begin(timeout_ms=0)
    assert [len((await store.sweep(2)).turns_expired) for _ in range(3)] == [2, 1, 0]


async def test_a_lost_epoch_does_not_take_the_session(store: RedisStore) -> None:
    owner = await Owner.of(store)
    successor = await taken(store, owner)
    outcome = await store.take("ses_f", owner.epoch, A, b"late")
    assert isinstance(outcome, EpochLost)
    assert outcome.session.epoch == successor.epoch
