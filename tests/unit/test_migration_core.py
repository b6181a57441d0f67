"""The next action of a move from its state, and the plan of a drain: pure, every way to the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.machines import MIGRATION, MigrationPhase
from gateway.core.migration import (
    Abort,
    Action,
    Began,
    Begin,
    Event,
    Failed,
    Finish,
    HeadMoved,
    Held,
    HoldTurn,
    Import,
    Imported,
    ImportFailed,
    MigrationLimits,
    Move,
    PlannedMove,
    Stays,
    Switch,
    Switched,
    advance,
    plan_drain,
    start,
)
from gateway.core.placement import PlacementModel
from statestore.records import Epoch, Owner, Position, ReplicaRef, Session, SessionState
from tests.support.fleets import MODEL, fleet, replica

A, B = ReplicaRef("a", 1), ReplicaRef("b", 1)
LIMITS = MigrationLimits(max_rounds=4, hand_over_tokens=32)
PAGE = 16


def at(length: int) -> Position:
    return Position(length, length.to_bytes(16, "big"))


def planned(allow_recompute: bool = False) -> Move:
    return Move("ses_a", A, B, PAGE, allow_recompute)


def imported(verified: int, head: int, turn: str | None = None) -> Imported:
    return Imported(verified, verified * 10, at(head), turn)


def play(move: Move, *events: Event) -> tuple[Move, list[Action]]:
    actions = [start(move)]
    for event in events:
        move, action = advance(move, event, LIMITS)
        actions.append(action)
    return move, actions


def test_an_idle_session_is_copied_verified_and_switched() -> None:
    move, actions = play(planned(), Began(at(100), None), imported(96, 100), Switched())
    assert actions == [Begin(), Import(at(100)), Switch(at(100), None), Finish(None)]
    assert move.phase is MigrationPhase.DONE
    assert (move.verified_tokens, move.bytes_copied, move.rounds) == (96, 960, 1)


def test_a_session_that_ends_with_its_page_is_moved_without_that_page() -> None:
    # The last token was sampled and not computed since: nobody has that page.
    _, actions = play(planned(), Began(at(96), None), imported(80, 96), Switched())
    assert actions == [Begin(), Import(at(96)), Switch(at(96), None), Finish(None)]
    _, actions = play(planned(), Began(at(PAGE), None), Switched())
    assert actions == [Begin(), Switch(at(PAGE), None), Finish(None)]
    _, actions = play(planned(), Began(at(97), None), imported(80, 97))
    assert actions[-1] == Import(at(97))


def test_a_running_turn_is_copied_in_rounds_and_held_only_for_the_last() -> None:
    move, actions = play(
        planned(),
        Began(at(1000), "t"),
        imported(992, 1100, "t"),
        imported(1088, 1104, "t"),
        Held(at(1110), "t"),
        imported(1104, 1110, "t"),
        Switched(),
    )
    assert actions == [
        Begin(),
        Import(at(1000)),
        Import(at(1100)),
        HoldTurn(),
        Import(at(1110)),
        Switch(at(1110), "t"),
        Finish("t"),
    ]
    assert move.phase is MigrationPhase.DONE


def test_a_turn_that_outruns_the_copy_is_held_before_the_rounds_run_out() -> None:
    _, actions = play(
        planned(),
        Began(at(1000), "t"),
        imported(992, 2000, "t"),
        imported(1984, 3000, "t"),
        imported(2992, 4000, "t"),
    )
    assert actions[-1] == HoldTurn()


def test_a_turn_that_ended_before_it_was_held_is_moved_idle() -> None:
    _, actions = play(
        planned(),
        Began(at(1000), "t"),
        imported(992, 1000, "t"),
        Held(at(1005), None),
        imported(992, 1005),
        Switched(),
    )
    assert actions[-2:] == [Switch(at(1005), None), Finish(None)]


def test_a_turn_that_began_before_the_switch_sends_the_move_back_to_copying() -> None:
    move, actions = play(
        planned(),
        Began(at(100), None),
        imported(96, 100),
        HeadMoved(at(130), "t"),
        imported(128, 135, "t"),
        Held(at(140), "t"),
    )
    assert actions[3:] == [Import(at(130)), HoldTurn(), Import(at(140))]
    assert move.phase is MigrationPhase.COPYING


def test_a_session_without_a_whole_page_is_switched_without_a_copy() -> None:
    _, actions = play(planned(), Began(at(5), None), Switched())
    assert actions == [Begin(), Switch(at(5), None), Finish(None)]


def test_a_broken_copy_aborts_and_names_the_reason() -> None:
    move, actions = play(planned(), Began(at(100), None), ImportFailed("reset by peer"))
    assert actions[-1] == Abort("reset by peer")
    assert move.phase is MigrationPhase.ABORTED
    assert move.detail == "reset by peer"


def test_a_broken_copy_is_switched_without_kv_where_that_is_allowed() -> None:
    move, actions = play(
        planned(allow_recompute=True), Began(at(100), None), ImportFailed("reset"), Switched()
    )
    assert actions[2:] == [Switch(at(100), None), Finish(None)]
    assert move.verified_tokens == 0
    assert move.detail == "without KV: reset"


def test_a_broken_copy_of_a_running_turn_still_holds_it_before_the_switch() -> None:
    _, actions = play(
        planned(allow_recompute=True),
        Began(at(100), "t"),
        ImportFailed("reset"),
        Held(at(110), "t"),
        ImportFailed("reset"),
        Switched(),
    )
    assert actions[2:] == [HoldTurn(), Import(at(110)), Switch(at(110), "t"), Finish("t")]


def test_a_gap_that_stays_aborts_unless_recompute_is_allowed() -> None:
    short = [imported(32, 100)] * LIMITS.max_rounds
    move, actions = play(planned(), Began(at(100), None), *short[: LIMITS.max_rounds - 1])
    assert isinstance(actions[-1], Abort)
    move, actions = play(
        planned(allow_recompute=True), Began(at(100), None), *short[: LIMITS.max_rounds - 1]
    )
    assert actions[-1] == Switch(at(100), None)
    assert move.verified_tokens == 32


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Began(at(100), "t")],
        [Began(at(100), "t"), imported(96, 100, "t")],
        [Began(at(100), "t"), imported(96, 100, "t"), Held(at(100), "t")],
        [Began(at(100), "t"), imported(96, 100, "t"), Held(at(100), "t"), imported(96, 100, "t")],
    ],
)
def test_a_failure_aborts_from_every_phase_before_the_switch(events: list[Event]) -> None:
    move, actions = play(planned(), *events, Failed("the owner changed"))
    assert move.phase is MigrationPhase.ABORTED
    assert actions[-1] == Abort("the owner changed")
    with pytest.raises(ValueError, match="ABORTED"):
        advance(move, Switched(), LIMITS)


EVENTS = st.one_of(
    st.builds(Began, st.integers(0, 200).map(at), st.sampled_from([None, "t"])),
    st.builds(
        Imported,
        st.integers(0, 200),
        st.integers(0, 10),
        st.integers(0, 400).map(at),
        st.sampled_from([None, "t"]),
    ),
    st.just(ImportFailed("x")),
    st.builds(Held, st.integers(0, 400).map(at), st.sampled_from([None, "t"])),
    st.just(Switched()),
    st.builds(HeadMoved, st.integers(0, 400).map(at), st.sampled_from([None, "t"])),
    st.just(Failed("x")),
)


@given(st.booleans(), st.lists(EVENTS, max_size=40))
def test_every_sequence_of_events_is_taken_and_ends_within_bounds(
    allow_recompute: bool, events: list[Event]
) -> None:
    move = planned(allow_recompute)
    for event in events:
        before = move
        move, action = advance(move, event, LIMITS)
        assert move.rounds <= LIMITS.max_rounds + 1
        if isinstance(action, Switch):
            assert move.phase is MigrationPhase.SWITCHING
            assert action.active_turn_id is None or move.held
        if isinstance(action, Finish):
            assert before.phase is MigrationPhase.SWITCHING
        if MIGRATION.final(move.phase):
            assert isinstance(action, Finish | Abort)
            return


def session(name: str, length: int, *, owner: ReplicaRef = A, turn: str | None = None) -> Session:
    epoch = Epoch(1, b"n" * 8)
    return Session(
        session_id=f"ses_{name}",
        tenant="acme",
        model=MODEL,
        state=SessionState.OPEN,
        owner=Owner(owner, epoch),
        epoch=epoch,
        head=at(length),
        turn_index=1,
        active_turn_id=turn,
        segments=(),
        own_base=0,
        preamble=b"",
        leading_digest=b"",
        token_fingerprint=bytes.fromhex("aa" * 16),
        labels=(),
        parent_id=None,
        migration=None,
        created_at_ms=0,
        updated_at_ms=0,
        previous_owner=None,
        version=1,
    )


def test_a_drain_moves_idle_sessions_first_and_short_ones_before_long_ones() -> None:
    sessions = [
        session("d", 10, turn="t"),
        session("c", 500),
        session("b", 20),
        session("a", 20),
        session("elsewhere", 1, owner=B),
    ]
    plan = plan_drain(sessions, A, fleet(replica("a"), replica("b")), PlacementModel())
    assert [p.session_id for p in plan] == ["ses_a", "ses_b", "ses_c", "ses_d"]
    assert all(isinstance(p, PlannedMove) and p.target == B for p in plan)
    assert [p.running for p in plan if isinstance(p, PlannedMove)] == [False, False, False, True]


def test_a_drain_spreads_its_sessions_over_the_others() -> None:
    others = fleet(replica("a"), replica("b"), replica("c"))
    sessions = [session(f"s{i:02}", 100) for i in range(20)]
    plan = plan_drain(sessions, A, others, PlacementModel())
    targets = [p.target.replica_id for p in plan if isinstance(p, PlannedMove)]
    assert abs(targets.count("b") - targets.count("c")) <= 1


def test_a_drain_says_why_a_session_stays() -> None:
    (stays,) = plan_drain([session("a", 10)], A, fleet(replica("a")), PlacementModel())
    assert stays == Stays("ses_a", "a#1: is where the session is")
