"""Heartbeats are counters, judged by the observer's clock and only while the store answers."""

from __future__ import annotations

import pytest

from gateway.core.liveness import Liveness, LivenessLimits, observed, refused
from gateway.core.machines import ReplicaState
from statestore.records import ReplicaRef
from tests.support.fleets import record

LIMITS = LivenessLimits(suspect_after_s=1.25, down_after_s=2.0, outage_after_s=1.0)
A = ReplicaRef("a", 1)
POLL_S = 0.25


def beating(until_s: float, *, start: Liveness | None = None, first_beat: int = 1) -> Liveness:
    """A replica that beats every half second, polled every quarter."""
    state = start or Liveness(LIMITS)
    polls = int(until_s / POLL_S)
    for poll in range(polls + 1):
        state = observed(state, [record("a", first_beat + poll // 2)], poll * POLL_S)
    return state


def silent(state: Liveness, beat: int, start_s: float, until_s: float) -> Liveness:
    """The store answers, the replica's counter stands still."""
    now = start_s
    while now < until_s:
        now += POLL_S
        state = observed(state, [record("a", beat)], now)
    return state


def test_a_record_alone_proves_nothing_until_its_counter_moves() -> None:
    state = observed(Liveness(LIMITS), [record("a", 7)], 0.0)
    assert state.state_of(A) is ReplicaState.PENDING
    state = observed(state, [record("a", 8)], 0.5)
    assert state.state_of(A) is ReplicaState.READY
    assert not state.stale(A)


def test_a_record_left_by_the_dead_goes_down_without_ever_being_ready() -> None:
    state = silent(observed(Liveness(LIMITS), [record("a", 7)], 0.0), 7, 0.0, 2.5)
    assert state.state_of(A) is ReplicaState.DOWN


def test_a_late_heartbeat_is_suspect_then_down() -> None:
    state = beating(1.0)
    assert state.state_of(A) is ReplicaState.READY
    suspect = silent(state, 3, 1.0, 2.5)
    assert suspect.state_of(A) is ReplicaState.SUSPECT
    assert suspect.stale(A)
    down = silent(suspect, 3, 2.5, 3.25)
    assert down.state_of(A) is ReplicaState.DOWN


def test_a_suspect_that_beats_again_is_ready() -> None:
    suspect = silent(beating(1.0), 3, 1.0, 2.5)
    back = observed(suspect, [record("a", 4)], 2.75)
    assert back.state_of(A) is ReplicaState.READY


def test_a_store_outage_ages_nobody_and_gives_one_lease_of_amnesty() -> None:
    state = beating(1.0)
    # The store is silent for ten seconds; the first answer shows the old counter.
    state = observed(state, [record("a", 3)], 11.0)
    assert state.state_of(A) is ReplicaState.READY
    state = silent(state, 3, 11.0, 12.0)
    assert state.state_of(A) is ReplicaState.READY
    # The amnesty ends: who is still silent after a lease is judged again.
    state = silent(state, 3, 12.0, 13.5)
    assert state.state_of(A) is ReplicaState.DOWN


def test_a_stall_of_the_observer_itself_is_an_outage_too() -> None:
    state = beating(1.0)
    state = observed(state, [record("a", 9)], 100.0)
    assert state.state_of(A) is ReplicaState.READY


def test_a_new_incarnation_replaces_the_old_one_at_once() -> None:
    state = beating(1.0)
    state = observed(state, [record("a", 1, incarnation=2)], 1.25)
    assert state.state_of(A) is ReplicaState.DOWN
    assert state.stale(A)
    assert state.state_of(ReplicaRef("a", 2)) is ReplicaState.PENDING


def test_a_good_bye_is_down_at_once() -> None:
    state = observed(beating(1.0), [record("a", 3, gone=True)], 1.25)
    assert state.state_of(A) is ReplicaState.DOWN


def test_a_replica_whose_record_vanished_is_down() -> None:
    assert observed(beating(1.0), [], 1.25).state_of(A) is ReplicaState.DOWN


def test_a_refused_connection_suspects_at_once_until_the_heartbeat_goes_on() -> None:
    state = refused(beating(1.0), A)
    assert state.state_of(A) is ReplicaState.SUSPECT
    assert state.stale(A)
    # One beat more may have been written before the process died.
    one = observed(state, [record("a", 4)], 1.25)
    assert one.state_of(A) is ReplicaState.SUSPECT
    two = observed(one, [record("a", 5)], 1.75)
    assert two.state_of(A) is ReplicaState.READY
    assert not two.stale(A)


def test_a_refusal_of_an_older_incarnation_changes_nothing() -> None:
    state = beating(1.0)
    assert refused(state, ReplicaRef("a", 0)) is state


def test_draining_stays_draining_while_it_beats_and_can_be_undone() -> None:
    state = observed(beating(1.0), [record("a", 4, draining=True)], 1.25)
    assert state.state_of(A) is ReplicaState.DRAINING
    state = observed(state, [record("a", 5, draining=True)], 1.5)
    assert state.state_of(A) is ReplicaState.DRAINING
    state = observed(state, [record("a", 5)], 1.75)
    assert state.state_of(A) is ReplicaState.PENDING
    assert observed(state, [record("a", 6)], 2.0).state_of(A) is ReplicaState.READY


def test_a_draining_replica_that_falls_silent_is_stale_then_down() -> None:
    state = observed(beating(1.0), [record("a", 4, draining=True)], 1.25)
    for now in (1.75, 2.25, 2.75):
        state = observed(state, [record("a", 4, draining=True)], now)
    assert state.state_of(A) is ReplicaState.DRAINING
    assert state.stale(A)
    for now in (3.0, 3.5):
        state = observed(state, [record("a", 4, draining=True)], now)
    assert state.state_of(A) is ReplicaState.DOWN


def test_contradictory_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="suspect_after_s"):
        LivenessLimits(suspect_after_s=3.0, down_after_s=2.0)
    with pytest.raises(ValueError, match="outage_after_s"):
        LivenessLimits(outage_after_s=5.0)
