"""Placing, taking and moving sessions."""

from __future__ import annotations

import pytest

from statestore import keys
from statestore.ports import (
    EpochLost,
    Fenced,
    HeadMismatch,
    Refused,
    SessionWritten,
    SwitchOutcome,
    TakeOutcome,
    TurnBegun,
    TurnEnded,
    TurnResumed,
)
from statestore.records import (
    NO_EPOCH,
    Epoch,
    Migration,
    Position,
    SessionState,
    StoreLimits,
    TurnStatus,
)
from statestore.records import Owner as Ownership
from statestore.redis_store import RedisStore
from tests.support.owners import A, B, Owner, opened, session_of
from tests.support.stores import ANSWERING, Backend, CountingExecutor, store_on

pytestmark = pytest.mark.anyio


async def test_an_unowned_session_is_placed(store: RedisStore) -> None:
    await opened(store)
    outcome = await store.place("ses_f", NO_EPOCH, A, b"\x00\xffnonce1")
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    assert session.epoch.nonce == b"\x00\xffnonce1"
    assert session.owner == Ownership(A, session.epoch)
    assert session.previous_owner is None
    # Numbers are microseconds of the store's clock.
    assert abs(session.epoch.number - session.updated_at_ms * 1000) < 2_000_000


async def test_placing_again_with_the_same_nonce_finds_it_done(store: RedisStore) -> None:
    await opened(store)
    outcome = await store.place("ses_f", NO_EPOCH, A, b"nonce")
    assert await store.place("ses_f", NO_EPOCH, A, b"nonce") == outcome


async def test_of_two_placements_one_wins(store: RedisStore) -> None:
    await opened(store)
    won = await store.place("ses_f", NO_EPOCH, A, b"one")
    lost = await store.place("ses_f", NO_EPOCH, B, b"two")
    assert isinstance(won, SessionWritten)
    assert lost == EpochLost(won.session)
    assert await store.place("ses_f", won.session.epoch, B, b"two") == EpochLost(won.session)


async def test_a_taken_session_remembers_its_previous_owner(store: RedisStore) -> None:
    owner = await Owner.of(store)
    outcome = await store.take("ses_f", owner.epoch, B, b"nonce")
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    assert session.owner == Ownership(B, session.epoch)
    assert session.previous_owner == A
    assert session.epoch > owner.epoch
    assert await store.take("ses_f", owner.epoch, B, b"nonce") == outcome


async def test_the_twin_of_an_epoch_takes_nothing(store: RedisStore) -> None:
    owner = await Owner.of(store)
    twin = Epoch(owner.epoch.number, b"twin")
    assert isinstance(await store.take("ses_f", twin, B, b"nonce"), EpochLost)
    assert isinstance(await store.place("ses_f", twin, B, b"nonce"), EpochLost)


async def test_a_session_can_be_taken_for_nobody_and_placed_later(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    outcome = await store.take("ses_f", owner.epoch, None, b"nonce")
    assert isinstance(outcome, SessionWritten)
    assert (outcome.session.owner, outcome.session.previous_owner) == (None, A)
    assert outcome.session.active_turn_id == "t1"
    assert await owner.write(9) == Fenced(outcome.session.epoch, None)
    placed = await store.place("ses_f", outcome.session.epoch, B, b"next")
    assert isinstance(placed, SessionWritten)
    assert placed.session.previous_owner == A
    assert isinstance(await store.resume_turn("ses_f", placed.session.epoch, "t1"), TurnResumed)


async def test_epochs_lost_with_the_servers_writes_are_not_granted_again(
    backend: Backend, store: RedisStore
) -> None:
    await opened(store)
    saved = await backend.save()
    lost = await Owner.of(store)
    await backend.roll_back(saved)
    again = await Owner.of(store)
    assert again.epoch.number > lost.epoch.number


async def test_epochs_grow_even_if_the_clock_of_the_server_steps_back(store: RedisStore) -> None:
    owner = await Owner.of(store)
    ahead = Epoch(owner.epoch.number + 10**12, b"ahead")
    head = owner.head
    await store.repair(Owner(store, "ses_f", B, ahead).repair(head, owner.epoch, keep=0))
    outcome = await store.take("ses_f", ahead, A, b"next")
    assert isinstance(outcome, SessionWritten)
    assert outcome.session.epoch.number == ahead.number + 1


# -- migration --------------------------------------------------------------------------------


async def migrating(store: RedisStore, owner: Owner, lease_ms: int = 60_000) -> None:
    outcome = await store.begin_migration("ses_f", owner.epoch, "m1", B, lease_ms)
    assert isinstance(outcome, SessionWritten)


async def test_a_move_is_recorded_beside_the_owner(store: RedisStore) -> None:
    owner = await Owner.of(store)
    outcome = await store.begin_migration("ses_f", owner.epoch, "m1", B, 60_000)
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    assert session.migration == Migration("m1", B, session.updated_at_ms + 60_000)
    assert session.owner == Ownership(A, owner.epoch)
    assert isinstance(await owner.begin(), TurnBegun)


async def test_one_move_at_a_time(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await migrating(store, owner)
    assert await store.begin_migration("ses_f", owner.epoch, "m2", B, 1000) == Refused(
        SessionState.OPEN
    )
    renewed = await store.begin_migration("ses_f", owner.epoch, "m1", B, 120_000)
    assert isinstance(renewed, SessionWritten)


async def test_a_move_whose_lease_ran_out_is_gone(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await migrating(store, owner, lease_ms=0)
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.migration is None
    refused = Refused(SessionState.OPEN)
    switch = await store.switch_migration("ses_f", owner.epoch, "m1", owner.head, None, b"n")
    assert switch == refused
    outcome = await store.begin_migration("ses_f", owner.epoch, "m2", B, 60_000)
    assert isinstance(outcome, SessionWritten)


async def test_only_the_present_owner_is_moved(store: RedisStore) -> None:
    owner = await Owner.of(store)
    outcome = await store.begin_migration("ses_f", Epoch(1, b"old"), "m1", B, 1000)
    assert isinstance(outcome, EpochLost)
    await store.take("ses_f", owner.epoch, None, b"nonce")
    session = await store.get_session("ses_f")
    assert session is not None
    outcome = await store.begin_migration("ses_f", session.epoch, "m1", B, 1000)
    assert isinstance(outcome, EpochLost)


async def test_an_idle_session_switches_to_the_target(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await migrating(store, owner)
    outcome = await store.switch_migration("ses_f", owner.epoch, "m1", owner.head, None, b"n")
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    assert session.owner == Ownership(B, session.epoch)
    assert (session.previous_owner, session.migration) == (A, None)
    assert await owner.begin("t2") == Fenced(session.epoch, B)
    again = await store.switch_migration("ses_f", owner.epoch, "m1", owner.head, None, b"n")
    assert again == outcome


async def test_a_running_turn_moves_without_using_up_its_attempts(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    for attempt in range(2, 6):
        await store.begin_migration("ses_f", owner.epoch, "m1", B, 60_000)
        outcome = await store.switch_migration(
            "ses_f", owner.epoch, "m1", owner.head, "t1", b"n%d" % attempt
        )
        assert isinstance(outcome, SessionWritten)
        assert isinstance(await owner.write(), Fenced)
        turn = await store.get_turn("ses_f", "t1")
        assert turn is not None
        assert turn.status is TurnStatus.INTERRUPTED
        owner.epoch = outcome.session.epoch
        resumed = await store.resume_turn("ses_f", owner.epoch, "t1")
        assert isinstance(resumed, TurnResumed)
        assert resumed.turn.attempt == attempt


async def test_a_switch_needs_what_the_target_verified(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await migrating(store, owner)
    head, nonce = owner.head, b"nonce"
    switch = store.switch_migration
    busy = Refused(SessionState.OPEN, "t1")
    assert await switch("ses_f", owner.epoch, "m2", head, "t1", nonce) == busy
    assert await switch("ses_f", owner.epoch, "m1", head, None, nonce) == busy
    assert await switch("ses_f", owner.epoch, "m1", head, "t2", nonce) == busy
    lost = await switch("ses_f", Epoch(1, b"old"), "m1", head, "t1", nonce)
    assert isinstance(lost, EpochLost)
    other = await switch("ses_f", owner.epoch, "m1", Position(3, b"other"), "t1", nonce)
    assert other == HeadMismatch(head, owner.epoch)
    await owner.write(4)
    moved_on = await switch("ses_f", owner.epoch, "m1", head, "t1", nonce)
    assert moved_on == HeadMismatch(owner.head, owner.epoch)
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.owner == Ownership(A, owner.epoch)


@ANSWERING
async def test_an_overdue_turn_ends_instead_of_moving(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begin(timeout_ms=0)
    await migrating(store, owner)
    outcome = await store.switch_migration("ses_f", owner.epoch, "m1", owner.head, "t1", b"n")
    assert outcome == Refused(SessionState.OPEN)
    turn = await store.get_turn("ses_f", "t1")
    assert turn is not None
    assert turn.status is TurnStatus.FAILED


async def test_an_aborted_move_leaves_the_owner_as_it_was(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await migrating(store, owner)
    await store.abort_migration("ses_f", "another")
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.migration is not None
    await store.abort_migration("ses_f", "m1")
    session = await store.get_session("ses_f")
    assert session is not None
    assert session.migration is None
    assert session.owner == Ownership(A, owner.epoch)
    await owner.write(4)
    switch = await store.switch_migration("ses_f", owner.epoch, "m1", owner.head, "t1", b"n")
    assert switch == Refused(SessionState.OPEN, "t1")


async def test_a_close_or_a_take_ends_a_move(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await migrating(store, owner)
    taken = await store.take("ses_f", owner.epoch, A, b"nonce")
    assert isinstance(taken, SessionWritten)
    assert taken.session.migration is None
    await store.begin_migration("ses_f", taken.session.epoch, "m2", B, 60_000)
    closed = await store.close("ses_f", None)
    assert isinstance(closed, SessionWritten)
    assert closed.session.migration is None


# -- the index of a replica's sessions --------------------------------------------------------


async def test_sessions_of_a_replica_are_listed(store: RedisStore) -> None:
    for name in "abc":
        await Owner.of(store, f"ses_{name}")
    await Owner.of(store, "ses_d", B)
    assert await store.sessions_of(A, 10) == ("ses_c", "ses_b", "ses_a")
    assert await store.sessions_of(A, 2) == ("ses_c", "ses_b")
    assert await store.sessions_of(B, 10) == ("ses_d",)


async def test_moved_taken_and_closed_sessions_leave_the_list(store: RedisStore) -> None:
    owners = {name: await Owner.of(store, f"ses_{name}") for name in "abcd"}
    await store.take("ses_a", owners["a"].epoch, B, b"nonce")
    await store.close("ses_b", None)
    moved = owners["c"]
    await store.begin_migration("ses_c", moved.epoch, "m1", B, 60_000)
    await store.switch_migration("ses_c", moved.epoch, "m1", moved.head, None, b"nonce")
    assert await store.sessions_of(A, 10) == ("ses_d",)
    assert set(await store.sessions_of(B, 10)) == {"ses_a", "ses_c"}


async def test_stale_entries_do_not_hide_sessions_and_are_dropped(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=10_000))
    for name in "abcde":
        owner = await Owner.of(store, f"ses_{name}")
        if name in "cde":
            await store.take(f"ses_{name}", owner.epoch, B, b"nonce")
    # Too young to be dropped, but passed over.
    assert await store.sessions_of(A, 2) == ("ses_b", "ses_a")
    forgetful = store_on(backend, StoreLimits(index_grace_ms=0))
    assert await forgetful.sessions_of(A, 2) == ("ses_b", "ses_a")
    before = await backend.save()
    for name in "ab":
        await store.close(f"ses_{name}", None)
    assert await forgetful.sessions_of(A, 10) == ()
    assert not any("replica-sessions:a#" in key for key in await backend.keys())
    assert before


async def test_an_ended_turn_stays_ended_through_a_take(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await store.cancel_turn("ses_f", "t1")
    taken = await store.take("ses_f", owner.epoch, B, b"nonce")
    assert isinstance(taken, SessionWritten)
    outcome = await store.resume_turn("ses_f", taken.session.epoch, "t1")
    assert isinstance(outcome, TurnEnded)
    assert outcome.turn.status is TurnStatus.CANCELLED


@pytest.mark.parametrize("by_move", [False, True])
@pytest.mark.parametrize("state", [SessionState.SUSPENDED, SessionState.CLOSED])
async def test_a_grant_that_is_over_is_not_confirmed(
    store: RedisStore, by_move: bool, state: SessionState
) -> None:
    owner = await Owner.of(store)
    await store.begin_migration("ses_f", owner.epoch, "m1", B, 60_000)

    async def grant() -> TakeOutcome | SwitchOutcome:
        if by_move:
            return await store.switch_migration(
                "ses_f", owner.epoch, "m1", owner.head, None, b"nonce"
            )
        return await store.take("ses_f", owner.epoch, B, b"nonce")

    assert isinstance(await grant(), SessionWritten)
    if state is SessionState.CLOSED:
        await store.close("ses_f", None)
    else:
        await store.suspend("ses_f")
    assert await grant() == Refused(state)


@ANSWERING
async def test_a_change_of_owner_takes_one_round_trip(backend: Backend) -> None:
    await Owner.of(store_on(backend))
    executor = CountingExecutor(backend.executor)
    store = RedisStore(executor, limits=StoreLimits(index_grace_ms=0))
    session = await session_of(store, "ses_f")
    executor.round_trips.clear()
    await store.take("ses_f", session.epoch, B, b"nonce")
    assert executor.round_trips[-1] == ["index_add", "take"]
    assert keys.replica_index_key(A) in await backend.keys()
    await store.fleet()
    assert keys.replica_index_key(A) not in await backend.keys()
