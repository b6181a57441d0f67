"""The store as its users see it: every method is one atomic compare-and-set.

Expected outcomes are returned as values (a closed union per method); exceptions mean failure:

    StoreError                      anything below
    ├── StoreUnavailable            no answer in time; the write may or may not have been applied.
    │                               Every write is idempotent: repeat it unchanged.
    ├── StoreCorrupt                a record cannot be read (newer schema, bad field)
    └── StoreMisconfigured          refuses to work on such a server (eviction policy, version)

Idempotence: a write that finds its own effect already there (same epoch nonce, position and
digest) answers as if it had just been applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from statestore.records import (
    Epoch,
    Lease,
    LedgerPiece,
    NewSession,
    Position,
    ReplicaRecord,
    ReplicaRef,
    ReplicaRegistration,
    Session,
    SessionPage,
    SessionState,
    SweepReport,
    TenantUsage,
    Turn,
    TurnContext,
    TurnResult,
    TurnSpec,
    UsageSum,
)


class StoreError(Exception):
    """Base of the store's failures."""


class StoreUnavailable(StoreError):
    """No answer in time. The write may have been applied; repeat it unchanged."""


class StoreCorrupt(StoreError):
    """A record cannot be read by this version."""


class StoreMisconfigured(StoreError):
    """The server's settings would lose data silently."""


# -- outcomes ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Missing:
    """No such session (or it was purged)."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The session's state forbids this: it is CLOSED or SUSPENDED, or busy with a turn."""

    state: SessionState
    active_turn_id: str | None = None


@dataclass(frozen=True, slots=True)
class Fenced:
    """The caller does not own the session (any more). ``owner_epoch`` is the stored one."""

    owner_epoch: Epoch
    owner: ReplicaRef | None
    data_loss: bool = False
    """The store lost writes and the two histories cannot be joined: it granted the epoch's number
    twice (with another nonce), or a repair would rewrite what a fork refers to."""


@dataclass(frozen=True, slots=True)
class HeadMismatch:
    """The ledger does not end where the caller expected; nothing was written. If ``stored`` is
    behind the caller's ledger, the store lost writes and the owner may ``repair``.
    ``stored_epoch`` and ``stored`` together are the ``observed`` of a repair."""

    stored: Position
    stored_epoch: Epoch


@dataclass(frozen=True, slots=True)
class LimitReached:
    """A bound of StoreLimits."""

    what: str


@dataclass(frozen=True, slots=True)
class SessionWritten:
    """The write was applied (or found applied); the record after it."""

    session: Session


@dataclass(frozen=True, slots=True)
class EpochLost:
    """The session's epoch is not the expected one: somebody else placed or took it; re-read."""

    session: Session


@dataclass(frozen=True, slots=True)
class TurnBegun:
    """The turn is accepted: input journalled, RUNNING under the caller's epoch."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnResumed:
    """The turn is RUNNING under the caller's epoch, in a new attempt; the records after it."""

    session: Session
    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnExists:
    """A turn with this id is already there (running, interrupted or ended)."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnConflict:
    """A turn with this id exists, with other input."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnInProgress:
    """Another turn of the session is running."""

    active_turn_id: str


@dataclass(frozen=True, slots=True)
class TurnTombstoned:
    """The turn was cancelled before it began."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The tokens are in the ledger, and the turn has ended if the write asked for it."""

    head: Position


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """The turn has ended (cancel, deadline, close, poison, or an earlier commit) and the tokens
    of this write were not taken, except those of a repair up to ``turn.output_end``, which is the
    ledger's end for the turn."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TurnUnknown:
    """No such turn (a cancel leaves a tombstone)."""


OpenOutcome = SessionWritten | Refused
PlaceOutcome = SessionWritten | EpochLost | Refused | Missing
TakeOutcome = SessionWritten | EpochLost | Refused | Missing
BeginOutcome = (
    TurnBegun
    | TurnExists
    | TurnConflict
    | TurnInProgress
    | TurnTombstoned
    | HeadMismatch
    | Fenced
    | Refused
    | LimitReached
    | Missing
)
ResumeOutcome = TurnResumed | TurnEnded | TurnUnknown | Fenced | Refused | Missing
AppendOutcome = Appended | TurnEnded | HeadMismatch | Fenced | TurnUnknown | Missing
RepairOutcome = Appended | TurnEnded | HeadMismatch | Fenced | Refused | Missing
CancelOutcome = TurnEnded | TurnUnknown | Missing
ForkOutcome = SessionWritten | HeadMismatch | Refused | Missing
SwitchOutcome = SessionWritten | EpochLost | HeadMismatch | Refused | Missing


@dataclass(frozen=True, slots=True)
class Append:
    """One append of a group commit.

    ``expected`` is the ledger's head before it; ``head`` the head after it (its length is
    ``expected.length + len(tokens)``, its digest computed by the caller). With ``commit`` the
    turn ends with this write. ``tokens`` may be empty with a commit.
    """

    session_id: str
    epoch: Epoch
    turn_id: str
    expected: Position
    tokens: Sequence[int]
    head: Position
    commit: TurnResult | None = None


@dataclass(frozen=True, slots=True)
class Repair:
    """Re-appends what the store lost (the owner still holds it).

    Applied only if the stored (epoch, head) is exactly ``observed_epoch``/``observed`` and the
    stored epoch is lower than ``epoch`` or the same grant. Keeps the first ``keep`` tokens, drops
    the rest, appends ``tokens``; the session's head becomes ``head``. ``turns`` are written where
    missing or behind, in index order; ``active_turn_id`` becomes the running turn (or none).
    Ended turns stay ended. One that a cancel or its deadline ended short of tokens that the store
    had lost gets these back and ends after them (as it is given, if as ended: the store had lost
    that end too), if nothing was built on its end since (no turn, no fork); if it is the active one
    here, the outcome is TurnEnded with that end. A tombstone ends the active turn, as a cancel.
    ``token_fingerprint``: what the tokens are; the store knows it only from the first turn's begin.
    CLOSED and missing sessions are never re-created.
    """

    session_id: str
    epoch: Epoch
    owner: ReplicaRef
    observed_epoch: Epoch
    observed: Position
    keep: int
    tokens: Sequence[int]
    head: Position
    turns: tuple[Turn, ...]
    active_turn_id: str | None
    turn_index: int
    token_fingerprint: bytes


class JournalPort(Protocol):
    """The part of the store that a turn runner may use (a worker's credentials reach no more)."""

    async def get_session(self, session_id: str) -> Session | None: ...

    async def get_turn(self, session_id: str, turn_id: str) -> Turn | None: ...

    async def get_turns(self, session: Session, start: int, count: int) -> tuple[Turn, ...]:
        """Turns by index, in order, inherited ones too, ended and active; at most ``count``
        (bounded by 1000), fewer if they are large: go on after the last one."""
        ...

    async def get_turn_context(
        self, session_id: str, turn_id: str, tokens_from: int
    ) -> TurnContext | None:
        """Session, turn and ledger from ``tokens_from`` on (a bounded piece of what is the
        session's own) in one round trip. None if there is no such session."""
        ...

    async def read_tokens(
        self, session: Session, start: int, end: int, known: LedgerPiece | None = None
    ) -> list[int]:
        """Tokens ``[start, end)`` over the segments and the own ledger; those that ``known`` holds
        are not read again. Shorter if the store has fewer. Reads in bounded pieces."""
        ...

    async def begin_turn(
        self,
        session_id: str,
        epoch: Epoch,
        expected: Position,
        spec: TurnSpec,
        input_tokens: Sequence[int],
        output_start: Position,
        *,
        token_fingerprint: bytes,
    ) -> BeginOutcome:
        """Accepts a turn: appends its rendered input and makes it the active turn."""
        ...

    async def resume_turn(self, session_id: str, epoch: Epoch, turn_id: str) -> ResumeOutcome:
        """The new owner goes on with an INTERRUPTED (or its own RUNNING) turn: attempt + 1. Ends
        it FAILED after ``max_attempts_without_progress`` attempts that added no token (a planned
        hand-over, or an owner's repeat of its own attempt, does not count), and as due if its
        deadline passed."""
        ...

    async def append_many(self, appends: Sequence[Append]) -> list[AppendOutcome | StoreError]:
        """Group commit: one pipeline, one outcome per append, in order. Failure of one leaves the
        others alone. Never raises StoreUnavailable itself: it is among the outcomes."""
        ...

    async def repair(self, repair: Repair) -> RepairOutcome: ...

    async def register_replica(self, registration: ReplicaRegistration) -> ReplicaRef:
        """Grants a new incarnation, replacing any earlier one of that id."""
        ...

    async def heartbeat(
        self,
        ref: ReplicaRef,
        counter: int,
        load: str,
        usage: Mapping[str, UsageSum] | None = None,
    ) -> int | None:
        """The counter that the store had before: one below what it has acknowledged tells that it
        lost writes. None if another incarnation has replaced this one (the process must stop).
        ``usage`` tells what this replica has written for each of these tenants: sums only grow, so
        that one that is told again, late or never counts once all the same."""
        ...

    async def set_draining(self, ref: ReplicaRef, draining: bool) -> bool: ...

    async def deregister_replica(self, ref: ReplicaRef) -> None: ...

    async def tenant_salt(self, tenant: str) -> bytes:
        """32 random bytes of the tenant, made at first use and never changed."""
        ...


class SessionStore(JournalPort, Protocol):
    """Everything; used by gateways."""

    async def find_or_admit(
        self, tenant: str, session_id: str, most: int
    ) -> Session | LimitReached | None:
        """The session; None if there is none and the tenant, which may have ``most`` (0: any
        number), may have another. Closed ones count until they are purged. Those that are opened at
        the same time may go past it."""
        ...

    async def open_session(self, new: NewSession) -> OpenOutcome:
        """Makes the session, or finds it there. Refused as CLOSED if it was purged and forks of it
        live on, or not long ago (``purged_ttl_ms``): a late repeat makes nothing anew."""
        ...

    async def place(
        self, session_id: str, expected: Epoch, owner: ReplicaRef, nonce: bytes
    ) -> PlaceOutcome:
        """Gives an unowned OPEN session an owner if its epoch is still ``expected``."""
        ...

    async def take(
        self, session_id: str, expected: Epoch, owner: ReplicaRef | None, nonce: bytes
    ) -> TakeOutcome:
        """Takes the session from its owner (lost or drained) under a new epoch, for ``owner`` or
        for nobody. A running turn becomes INTERRUPTED, or ends if its deadline passed."""
        ...

    async def cancel_turn(self, session_id: str, turn_id: str) -> CancelOutcome:
        """Ends the turn as CANCELLED at the ledger's present end; an unknown id leaves a
        tombstone. An ended turn is returned as it ended."""
        ...

    async def suspend(self, session_id: str) -> SessionWritten | Refused | Missing:
        """Ends ownership of an idle session until ``unsuspend`` and the next ``place``; the epoch
        stays, and its owner is fenced."""
        ...

    async def unsuspend(self, session_id: str) -> SessionWritten | Refused | Missing: ...

    async def close(self, session_id: str, retention_ms: int | None) -> SessionWritten | Missing:
        """CLOSED for good; a running turn ends CANCELLED; 0 purges at once (the returned record is
        then the last one). Idempotent. Ownership ends; ``previous_owner`` may still hold KV.
        Tokens and turns that forks refer to live on as long as these."""
        ...

    async def fork(
        self,
        session_id: str,
        child_id: str,
        at_turn_index: int | None,
        labels: tuple[tuple[str, str], ...],
    ) -> ForkOutcome:
        """A child of the same family whose ledger and turns are this one's up to a turn boundary,
        by reference. Ids of inherited turns are not ids of the child. Refused as CLOSED if the
        child was purged, as for ``open_session``."""
        ...

    async def list_sessions(self, tenant: str, cursor: str, count: int) -> SessionPage:
        """Newest first, at most ``count`` (bounded by 1000), fewer if they are large; entries whose
        record is gone are dropped from the index."""
        ...

    async def begin_migration(
        self, session_id: str, epoch: Epoch, migration_id: str, target: ReplicaRef, lease_ms: int
    ) -> SessionWritten | EpochLost | Refused | Missing:
        """Writes the leased side record. Refused while another live migration is there."""
        ...

    async def switch_migration(
        self,
        session_id: str,
        epoch: Epoch,
        migration_id: str,
        verified: Position,
        active_turn_id: str | None,
        nonce: bytes,
    ) -> SwitchOutcome:
        """Ownership passes to the migration's target under a new epoch, if epoch, migration,
        head (``verified``, exactly) and active turn are as the target verified them. A running
        turn becomes INTERRUPTED without counting against its attempts."""
        ...

    async def abort_migration(self, session_id: str, migration_id: str) -> None: ...

    async def sessions_of(self, ref: ReplicaRef, count: int) -> tuple[str, ...]:
        """Ids of sessions owned by a replica process, by an index outside the family slots:
        eventually consistent, repaired on read."""
        ...

    async def fleet(self) -> tuple[ReplicaRecord, ...]:
        """All replicas, sorted by id."""
        ...

    async def acquire_lease(self, name: str, holder: str, ttl_ms: int) -> Lease | None:
        """Gets or renews a lease; None while somebody else holds it."""
        ...

    async def release_lease(self, lease: Lease) -> None: ...

    async def read_usage(self, tenant: str, tokens_per_minute: int) -> TenantUsage:
        """What is left of the tenant's tokens for a minute (of a bucket that fills evenly and holds
        ``tokens_per_minute``; 0: none is kept), and its tokens in ledgers."""
        ...

    async def note_usage(self, tenant: str, age_ms: int = 0) -> None:
        """Has the tenant's ledgers counted again, as if the last count had been so long ago, or
        longer."""
        ...

    async def uncounted_tenant(self, min_age_ms: int) -> str | None:
        """Whose last count is the longest ago, if it began before ``min_age_ms``; its next count is
        taken to begin now."""
        ...

    async def count_ledgers(self, tenant: str, cursor: str, count: int) -> tuple[int, str]:
        """Tokens in the ledgers of up to ``count`` sessions of the tenant, and where to go on."""
        ...

    async def settle_usage(self, tenant: str, told: int, counted: int) -> None:
        """The tenant's ledgers had ``counted`` tokens, where ``told`` were known when the count
        began."""
        ...

    async def sweep(self, count: int) -> SweepReport:
        """Ends turns past their deadline and purges closed sessions past their retention; at most
        ``count`` sessions."""
        ...
