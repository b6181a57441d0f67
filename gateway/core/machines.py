"""The life cycles, as explicit transition tables.

Each machine is a table ``{state: {event: next state}}``. :func:`step` is total: an event that a
state does not take gives ``Illegal``, never an exception, and the caller decides what that means.
The store's scripts enforce the session's and the turn's table atomically; the gateway drives the
replica's (from heartbeats) and the migration's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=enum.StrEnum)
E = TypeVar("E", bound=enum.StrEnum)


@dataclass(frozen=True, slots=True)
class Illegal(Generic[S, E]):
    """``event`` cannot happen in ``state``; nothing changes."""

    state: S
    event: E


@dataclass(frozen=True, slots=True)
class Machine(Generic[S, E]):
    """A transition table. States without a row (or with an empty one) are final."""

    initial: S
    table: Mapping[S, Mapping[E, S]]

    def step(self, state: S, event: E) -> S | Illegal[S, E]:
        """The next state, or ``Illegal``."""
        after = self.table.get(state, {}).get(event)
        return Illegal(state, event) if after is None else after

    def final(self, state: S) -> bool:
        return not self.table.get(state)


class SessionPhase(enum.StrEnum):
    """A session's state and placement together."""

    UNPLACED = "UNPLACED"
    PLACED = "PLACED"
    SUSPENDED = "SUSPENDED"
    CLOSED = "CLOSED"


class SessionEvent(enum.StrEnum):
    """What happens to a session."""

    PLACE = "PLACE"
    TAKE = "TAKE"
    """Its owner was lost or moved away from; another replica owns it now."""
    UNPLACE = "UNPLACE"
    """Taken from its owner for nobody."""
    SUSPEND = "SUSPEND"
    RESUME = "RESUME"
    CLOSE = "CLOSE"


SESSION: Machine[SessionPhase, SessionEvent] = Machine(
    SessionPhase.UNPLACED,
    {
        SessionPhase.UNPLACED: {
            SessionEvent.PLACE: SessionPhase.PLACED,
            SessionEvent.SUSPEND: SessionPhase.SUSPENDED,
            SessionEvent.CLOSE: SessionPhase.CLOSED,
        },
        SessionPhase.PLACED: {
            SessionEvent.TAKE: SessionPhase.PLACED,
            SessionEvent.UNPLACE: SessionPhase.UNPLACED,
            SessionEvent.SUSPEND: SessionPhase.SUSPENDED,
            SessionEvent.CLOSE: SessionPhase.CLOSED,
        },
        SessionPhase.SUSPENDED: {
            SessionEvent.SUSPEND: SessionPhase.SUSPENDED,
            SessionEvent.RESUME: SessionPhase.UNPLACED,
            SessionEvent.CLOSE: SessionPhase.CLOSED,
        },
        SessionPhase.CLOSED: {SessionEvent.CLOSE: SessionPhase.CLOSED},
    },
)


class TurnPhase(enum.StrEnum):
    """A turn's life; ACCEPTED is the moment between the request and its begin in the ledger."""

    ACCEPTED = "ACCEPTED"
    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    COMMITTED = "COMMITTED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class TurnEvent(enum.StrEnum):
    """What happens to a turn."""

    BEGIN = "BEGIN"
    COMMIT = "COMMIT"
    OWNER_LOST = "OWNER_LOST"
    RESUME = "RESUME"
    CANCEL = "CANCEL"
    FAIL = "FAIL"
    """Its deadline passed, it was poison, or the replica reported an error."""


TURN: Machine[TurnPhase, TurnEvent] = Machine(
    TurnPhase.ACCEPTED,
    {
        TurnPhase.ACCEPTED: {
            TurnEvent.BEGIN: TurnPhase.RUNNING,
            TurnEvent.CANCEL: TurnPhase.CANCELLED,
            TurnEvent.FAIL: TurnPhase.FAILED,
        },
        TurnPhase.RUNNING: {
            TurnEvent.COMMIT: TurnPhase.COMMITTED,
            TurnEvent.OWNER_LOST: TurnPhase.INTERRUPTED,
            # The owner may resume its own turn: an engine that failed and was restarted.
            TurnEvent.RESUME: TurnPhase.RUNNING,
            TurnEvent.CANCEL: TurnPhase.CANCELLED,
            TurnEvent.FAIL: TurnPhase.FAILED,
        },
        TurnPhase.INTERRUPTED: {
            TurnEvent.OWNER_LOST: TurnPhase.INTERRUPTED,
            TurnEvent.RESUME: TurnPhase.RUNNING,
            TurnEvent.CANCEL: TurnPhase.CANCELLED,
            TurnEvent.FAIL: TurnPhase.FAILED,
        },
        TurnPhase.COMMITTED: {},
        TurnPhase.CANCELLED: {},
        TurnPhase.FAILED: {},
    },
)


class ReplicaState(enum.StrEnum):
    """A replica's incarnation as one gateway sees it."""

    PENDING = "PENDING"
    READY = "READY"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"
    DOWN = "DOWN"


class ReplicaEvent(enum.StrEnum):
    """What a gateway observes of a replica."""

    BEAT = "BEAT"
    """Its heartbeat counter advanced."""
    LATE = "LATE"
    """It did not for the suspicion time, or a connection was refused."""
    EXPIRED = "EXPIRED"
    """It did not for a whole lease."""
    DRAIN = "DRAIN"
    UNDRAIN = "UNDRAIN"
    GONE = "GONE"
    """It said good-bye, or another incarnation replaced it."""


REPLICA: Machine[ReplicaState, ReplicaEvent] = Machine(
    ReplicaState.PENDING,
    {
        ReplicaState.PENDING: {
            ReplicaEvent.BEAT: ReplicaState.READY,
            ReplicaEvent.LATE: ReplicaState.PENDING,
            ReplicaEvent.EXPIRED: ReplicaState.DOWN,
            ReplicaEvent.DRAIN: ReplicaState.DRAINING,
            ReplicaEvent.GONE: ReplicaState.DOWN,
        },
        ReplicaState.READY: {
            ReplicaEvent.BEAT: ReplicaState.READY,
            ReplicaEvent.LATE: ReplicaState.SUSPECT,
            ReplicaEvent.EXPIRED: ReplicaState.DOWN,
            ReplicaEvent.DRAIN: ReplicaState.DRAINING,
            ReplicaEvent.GONE: ReplicaState.DOWN,
        },
        ReplicaState.SUSPECT: {
            ReplicaEvent.BEAT: ReplicaState.READY,
            ReplicaEvent.LATE: ReplicaState.SUSPECT,
            ReplicaEvent.EXPIRED: ReplicaState.DOWN,
            ReplicaEvent.DRAIN: ReplicaState.DRAINING,
            ReplicaEvent.GONE: ReplicaState.DOWN,
        },
        ReplicaState.DRAINING: {
            ReplicaEvent.BEAT: ReplicaState.DRAINING,
            ReplicaEvent.LATE: ReplicaState.DRAINING,
            ReplicaEvent.DRAIN: ReplicaState.DRAINING,
            ReplicaEvent.UNDRAIN: ReplicaState.PENDING,
            ReplicaEvent.EXPIRED: ReplicaState.DOWN,
            ReplicaEvent.GONE: ReplicaState.DOWN,
        },
        # A replica whose heartbeat comes back after its lease was only slow or cut off: it is the
        # same process, and epochs protect what was taken from it meanwhile.
        ReplicaState.DOWN: {
            ReplicaEvent.BEAT: ReplicaState.READY,
            ReplicaEvent.DRAIN: ReplicaState.DOWN,
            ReplicaEvent.LATE: ReplicaState.DOWN,
            ReplicaEvent.EXPIRED: ReplicaState.DOWN,
            ReplicaEvent.GONE: ReplicaState.DOWN,
        },
    },
)


class MigrationPhase(enum.StrEnum):
    """A move of one session."""

    PLANNED = "PLANNED"
    COPYING = "COPYING"
    SWITCHING = "SWITCHING"
    DONE = "DONE"
    ABORTED = "ABORTED"


class MigrationEvent(enum.StrEnum):
    """What happens to a move."""

    BEGUN = "BEGUN"
    """The side record is written."""
    COPIED = "COPIED"
    """A round ended; another is needed."""
    READY = "READY"
    """What the target holds covers the ledger's end."""
    BEHIND = "BEHIND"
    """The ledger grew before the switch: copy again."""
    SWITCHED = "SWITCHED"
    FAIL = "FAIL"


MIGRATION: Machine[MigrationPhase, MigrationEvent] = Machine(
    MigrationPhase.PLANNED,
    {
        MigrationPhase.PLANNED: {
            MigrationEvent.BEGUN: MigrationPhase.COPYING,
            MigrationEvent.FAIL: MigrationPhase.ABORTED,
        },
        MigrationPhase.COPYING: {
            MigrationEvent.COPIED: MigrationPhase.COPYING,
            MigrationEvent.READY: MigrationPhase.SWITCHING,
            MigrationEvent.FAIL: MigrationPhase.ABORTED,
        },
        MigrationPhase.SWITCHING: {
            MigrationEvent.BEHIND: MigrationPhase.COPYING,
            MigrationEvent.SWITCHED: MigrationPhase.DONE,
            MigrationEvent.FAIL: MigrationPhase.ABORTED,
        },
        MigrationPhase.DONE: {},
        MigrationPhase.ABORTED: {},
    },
)
