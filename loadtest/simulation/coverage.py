"""How often each transition of the machines was seen, and each row of the failure table.

Sessions and turns are counted by the witness, from the records that scripts leave; replicas and
moves as the gateways' own machines step.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from unittest import mock

from gateway.core import liveness
from gateway.core import migration as moves
from gateway.core.machines import (
    MIGRATION,
    REPLICA,
    SESSION,
    TURN,
    Illegal,
    Machine,
    MigrationEvent,
)

S = TypeVar("S", bound=enum.StrEnum)
E = TypeVar("E", bound=enum.StrEnum)


class Row(enum.StrEnum):
    """What fails, and what was seen of the answer to it."""

    REPLICA_DIES = "a replica dies in a turn: another one continues it"
    REPLICA_HANGS = "a replica hangs and wakes: its late write is refused"
    GATEWAY_DIES = "a gateway dies with a stream open: its client goes on through another"
    STORE_RESTARTS = "the store restarts while turns run: they go on"
    STORE_FAILS_OVER = "the store loses writes: their owner repairs the ledger"
    STORE_AND_OWNER = "the store loses writes and their owner is gone: the client is told"
    STORE_LOSES_A_MOVE = "the store loses a move: whoever knows of what went with it is told"
    TRANSFER_BREAKS = "a transfer of KV breaks or brings wrong bytes: not used"
    DRAIN_MOVES_IDLE = "a replica drains: an idle session is moved with its KV"
    DRAIN_HANDS_OVER = "a replica drains: a running turn is handed over"
    DRAIN_ENDS = "a drained replica ends when it is empty"
    OVERLOAD = "overload: refused early, with a delay"


MACHINES: dict[str, Machine[enum.StrEnum, enum.StrEnum]] = {
    "session": SESSION,  # type: ignore[dict-item]
    "turn": TURN,  # type: ignore[dict-item]
    "replica": REPLICA,  # type: ignore[dict-item]
    "migration": MIGRATION,  # type: ignore[dict-item]
}

UNREACHABLE: Mapping[str, str] = {
    "replica: DRAINING -DRAIN-> DRAINING": "gateways step it when a record begins to say so",
}
"""Transition -> why no history can have it."""

RARE: Mapping[str, str] = {
    "turn: RUNNING -RESUME-> RUNNING": "its owner gave the turn up and nobody took it meanwhile",
    "turn: INTERRUPTED -CANCEL-> CANCELLED": "within milliseconds between a take and the resume",
    "turn: INTERRUPTED -FAIL-> FAILED": "the deadline passes in that moment, or it was poison",
    "replica: READY -EXPIRED-> DOWN": "two polls of a gateway are nearly an outage apart",
    "replica: DOWN -DRAIN-> DOWN": "an outage's amnesty for a dead replica that was to drain",
    "migration: SWITCHING -BEHIND-> COPYING": "a turn begins or ends just before the switch",
    "migration: SWITCHING -FAIL-> ABORTED": "just then the session closes, or the lease ends",
}
"""Transition -> what it takes. The standard histories are not asked for them: each is reached by a
golden scenario that ``tests/sim/test_scenarios.py`` names."""


def transition(machine: str, state: enum.StrEnum, event: enum.StrEnum) -> str:
    """How a transition is named here."""
    return f"{machine}: {state} -{event}-> {MACHINES[machine].table[state][event]}"


def everything() -> list[str]:
    """Every transition and every row, in the order in which they are reported."""
    transitions = [
        transition(name, state, event)
        for name, machine in MACHINES.items()
        for state, row in machine.table.items()
        for event in row
    ]
    return [*transitions, *Row]


def missing(seen: Mapping[str, int]) -> list[str]:
    """What a few hundred histories reach, and these did not."""
    return [
        name for name in everything() if not (name in UNREACHABLE or name in RARE or seen.get(name))
    ]


@dataclass(frozen=True, slots=True)
class _Counting(Machine[S, E]):
    """A machine that counts its transitions."""

    name: str = ""
    seen: Counter[str] = field(default_factory=Counter)

    def step(self, state: S, event: E) -> S | Illegal[S, E]:
        after = Machine.step(self, state, event)
        if not isinstance(after, Illegal):
            self.seen[transition(self.name, state, event)] += 1
        return after


@contextmanager
def counted(seen: Counter[str]) -> Iterator[None]:
    """Counts what replicas and moves go through meanwhile."""
    replica = _Counting(REPLICA.initial, REPLICA.table, "replica", seen)
    migration = _Counting(MIGRATION.initial, MIGRATION.table, "migration", seen)
    abort = moves._abort

    def counting(move: moves.Move, why: str) -> tuple[moves.Move, moves.Action]:
        seen[transition("migration", move.phase, MigrationEvent.FAIL)] += 1
        return abort(move, why)

    with (
        mock.patch.object(moves, "_abort", counting),
        mock.patch.object(liveness, "REPLICA", replica),
        mock.patch.object(moves, "MIGRATION", migration),
    ):
        yield
