"""The life cycles: every pair of state and event is decided as the design says."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import pytest

from gateway.core.machines import (
    MIGRATION,
    REPLICA,
    SESSION,
    TURN,
    Illegal,
    Machine,
    MigrationEvent,
    MigrationPhase,
    ReplicaEvent,
    ReplicaState,
    SessionEvent,
    SessionPhase,
    TurnEvent,
    TurnPhase,
)
from statestore.records import SessionState, TurnStatus

MACHINES: list[tuple[Machine[Any, Any], type[enum.StrEnum], type[enum.StrEnum]]] = [
    (SESSION, SessionPhase, SessionEvent),
    (TURN, TurnPhase, TurnEvent),
    (REPLICA, ReplicaState, ReplicaEvent),
    (MIGRATION, MigrationPhase, MigrationEvent),
]

LEGAL = {
    "session": {
        "UNPLACED": {"PLACE": "PLACED", "SUSPEND": "SUSPENDED", "CLOSE": "CLOSED"},
        "PLACED": {
            "TAKE": "PLACED",
            "UNPLACE": "UNPLACED",
            "SUSPEND": "SUSPENDED",
            "CLOSE": "CLOSED",
        },
        "SUSPENDED": {"SUSPEND": "SUSPENDED", "RESUME": "UNPLACED", "CLOSE": "CLOSED"},
        "CLOSED": {"CLOSE": "CLOSED"},
    },
    "turn": {
        "ACCEPTED": {"BEGIN": "RUNNING", "CANCEL": "CANCELLED", "FAIL": "FAILED"},
        "RUNNING": {
            "COMMIT": "COMMITTED",
            "OWNER_LOST": "INTERRUPTED",
            "RESUME": "RUNNING",
            "CANCEL": "CANCELLED",
            "FAIL": "FAILED",
        },
        "INTERRUPTED": {
            "OWNER_LOST": "INTERRUPTED",
            "RESUME": "RUNNING",
            "CANCEL": "CANCELLED",
            "FAIL": "FAILED",
        },
        "COMMITTED": {},
        "CANCELLED": {},
        "FAILED": {},
    },
    "replica": {
        "PENDING": {
            "BEAT": "READY",
            "LATE": "PENDING",
            "EXPIRED": "DOWN",
            "DRAIN": "DRAINING",
            "GONE": "DOWN",
        },
        "READY": {
            "BEAT": "READY",
            "LATE": "SUSPECT",
            "EXPIRED": "DOWN",
            "DRAIN": "DRAINING",
            "GONE": "DOWN",
        },
        "SUSPECT": {
            "BEAT": "READY",
            "LATE": "SUSPECT",
            "EXPIRED": "DOWN",
            "DRAIN": "DRAINING",
            "GONE": "DOWN",
        },
        "DRAINING": {
            "BEAT": "DRAINING",
            "LATE": "DRAINING",
            "DRAIN": "DRAINING",
            "UNDRAIN": "PENDING",
            "EXPIRED": "DOWN",
            "GONE": "DOWN",
        },
        "DOWN": {
            "BEAT": "READY",
            "DRAIN": "DOWN",
            "LATE": "DOWN",
            "EXPIRED": "DOWN",
            "GONE": "DOWN",
        },
    },
    "migration": {
        "PLANNED": {"BEGUN": "COPYING", "FAIL": "ABORTED"},
        "COPYING": {"COPIED": "COPYING", "READY": "SWITCHING", "FAIL": "ABORTED"},
        "SWITCHING": {"BEHIND": "COPYING", "SWITCHED": "DONE", "FAIL": "ABORTED"},
        "DONE": {},
        "ABORTED": {},
    },
}

PAIRS = [
    (name, machine, state, event)
    for (machine, states, events), name in zip(MACHINES, LEGAL, strict=True)
    for state, event in itertools.product(states, events)
]


@pytest.mark.parametrize(("name", "machine", "state", "event"), PAIRS)
def test_every_pair_of_state_and_event_is_decided(
    name: str, machine: Machine[Any, Any], state: enum.StrEnum, event: enum.StrEnum
) -> None:
    expected = LEGAL[name][state.value].get(event.value)
    got = machine.step(state, event)
    if expected is None:
        assert got == Illegal(state, event)
    else:
        assert got == expected


@pytest.mark.parametrize(("machine", "states", "events"), MACHINES)
def test_every_state_can_be_reached(
    machine: Machine[Any, Any], states: type[enum.StrEnum], events: type[enum.StrEnum]
) -> None:
    reached, frontier = {machine.initial}, [machine.initial]
    while frontier:
        state = frontier.pop()
        for event in events:
            after = machine.step(state, event)
            if not isinstance(after, Illegal) and after not in reached:
                reached.add(after)
                frontier.append(after)
    assert reached == set(states)


def test_the_tables_speak_of_the_stored_states() -> None:
    assert {s.value for s in TurnStatus} == {p.value for p in TurnPhase} - {"ACCEPTED"}
    assert {s.value for s in TurnStatus if s.ended} == {p.value for p in TurnPhase if TURN.final(p)}
    assert {s.value for s in SessionState} - {"OPEN"} <= {p.value for p in SessionPhase}


def test_a_move_that_ended_stays_ended() -> None:
    assert MIGRATION.final(MigrationPhase.DONE)
    assert MIGRATION.final(MigrationPhase.ABORTED)
