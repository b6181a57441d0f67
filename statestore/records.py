"""What Sessile keeps in its store, as immutable values.

A session is an append-only ledger of token ids with one fenced owner. These records carry no
behaviour beyond their own consistency; the rules for changing them live in the Lua scripts
(``statestore/lua``) because only there can they be atomic.

Units: positions and lengths count tokens; ``*_ms`` are milliseconds; ``*_at_ms`` are Unix
milliseconds of the *store's* clock (never of a caller's).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

SCHEMA_VERSION = 1
"""Version written into every record; readers refuse records whose ``min_reader`` is newer."""


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """Orders a session's owners. ``number`` is about store time in microseconds; ``nonce`` (8
    bytes) tells two grants of the same number apart after the store lost writes."""

    number: int
    nonce: bytes


NO_EPOCH = Epoch(0, b"")
"""Epoch of a session that never had an owner."""


@dataclass(frozen=True, slots=True, order=True)
class ReplicaRef:
    """One replica process: a restarted replica has a new incarnation."""

    replica_id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.replica_id}#{self.incarnation}"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a ledger: ``length`` tokens precede it, whose rolling digest is ``digest``."""

    length: int
    digest: bytes


class SessionState(enum.StrEnum):
    """Life of a session. Whether it is placed is ``owner is not None``; whether it is busy is
    ``active_turn_id is not None``."""

    OPEN = "OPEN"
    SUSPENDED = "SUSPENDED"
    CLOSED = "CLOSED"


class TurnStatus(enum.StrEnum):
    """Life of a turn."""

    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    COMMITTED = "COMMITTED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        return self in (TurnStatus.COMMITTED, TurnStatus.CANCELLED, TurnStatus.FAILED)


class FinishReason(enum.StrEnum):
    """Why a turn ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``[start, end)`` and turns ``[first_turn, end_turn)`` of a session are those of
    ``ancestor_id``, at the same positions (a fork refers to its ancestors and copies nothing)."""

    ancestor_id: str
    start: int
    end: int
    first_turn: int
    end_turn: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may write the ledger."""

    replica: ReplicaRef
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Migration:
    """A leased side record: a move of the session to ``target`` is under way until
    ``lease_until_ms``. It changes nothing about who owns the session."""

    migration_id: str
    target: ReplicaRef
    lease_until_ms: int


@dataclass(frozen=True, slots=True)
class NewSession:
    """Asks for a session. ``session_id`` is derived by the caller from tenant and request id, so
    a retry meets its own record."""

    session_id: str
    tenant: str
    model: str
    preamble: bytes
    """Opaque to the store: leading messages, tools, default sampling (serialised by the caller)."""
    root_digest: bytes
    """Digest of the empty ledger (keyed by the tenant's salt)."""
    leading_digest: bytes = b""
    """Tenant-salted digest of the canonical leading messages: places new sessions by prefix."""
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """A session as stored."""

    session_id: str
    tenant: str
    model: str
    state: SessionState
    owner: Owner | None
    epoch: Epoch
    """Last granted epoch; kept when the owner is cleared, so epochs only grow."""
    head: Position
    turn_index: int
    """Turns ended so far; also the index of the active turn."""
    active_turn_id: str | None
    segments: tuple[Segment, ...]
    """Inherited tokens and turns, in order, without gaps from 0; empty unless forked."""
    own_base: int
    """Position of the first token in the session's own ledger key."""
    preamble: bytes
    leading_digest: bytes
    token_fingerprint: bytes
    """Set by the first turn; empty before."""
    labels: tuple[tuple[str, str], ...]
    parent_id: str | None
    migration: Migration | None
    created_at_ms: int
    updated_at_ms: int
    previous_owner: ReplicaRef | None
    """Owner before the last change of owner: may still hold the KV prefix."""
    version: int
    """Grows with every write of the record; for watchers and caches."""
    turn_ended_at_ms: int = 0
    """When its last turn ended; 0 before the first one did, for a fork of its own."""

    @property
    def ledger_bytes(self) -> int:
        """What the session's own ledger takes in the store. Inherited tokens count where they are
        (those of a purged ancestor, kept for its forks, with nobody)."""
        return 4 * (self.head.length - self.own_base)


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """What a turn was accepted with. Immutable; enough to continue the turn on any replica."""

    turn_id: str
    input_digest: bytes
    """Digest of the request's messages and parameters: a repeat with other input is refused."""
    body: bytes
    """Opaque to the store: messages, resolved sampling parameters (serialised by the worker)."""
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class TurnResult:
    """How a turn ended. ``usage`` is opaque to the store (serialised by the worker)."""

    status: TurnStatus
    reason: FinishReason
    text_end: int = 0
    """Length of the turn's output text in code points."""
    usage: bytes = b""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as stored. Tokens ``[input_start, output_start)`` are its rendered input, tokens
    ``[output_start, output_end)`` its output so far."""

    spec: TurnSpec
    index: int
    status: TurnStatus
    attempt: int
    input_start: int
    output_start: Position
    output_end: Position
    deadline_at_ms: int
    result: TurnResult | None
    attempt_replica: ReplicaRef | None = None


@dataclass(frozen=True, slots=True)
class LedgerPiece:
    """Tokens of a ledger from position ``start`` on."""

    start: int
    tokens: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class TurnContext:
    """What a replica needs to begin a turn or go on with it, read at one moment."""

    session: Session
    turn: Turn | None
    """The turn asked for, if the session has it."""
    ledger: LedgerPiece
    """Of the session's own ledger: begins later than asked for if that part is inherited, and
    ends before the head if there is more than one read may bring."""


@dataclass(frozen=True, slots=True)
class ReplicaRegistration:
    """What a replica says about itself once per incarnation. ``details`` is opaque JSON text
    (model limits, fingerprints, endpoints) of at most 8 KiB."""

    replica_id: str
    details: str


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A replica as stored. ``heartbeat`` is a counter: observers judge it by their own monotonic
    clock, never by comparing wall clocks."""

    ref: ReplicaRef
    details: str
    heartbeat: int
    load: str
    """Opaque JSON text, replaced with each heartbeat."""
    draining: bool
    gone: bool
    """The process said good-bye (or another incarnation replaced it)."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A fenced lease on a named duty (the sweeper, the rebalancer)."""

    name: str
    holder: str
    token: int
    """Grows with every change of holder."""


@dataclass(frozen=True, slots=True)
class SessionPage:
    """One page of a tenant's sessions, newest first."""

    sessions: tuple[Session, ...]
    next_cursor: str = ""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds the store enforces; over them a write is refused as ``LimitReached``."""

    max_turns_per_session: int = 4096
    max_segments: int = 32
    """A fork that would inherit from more ancestors copies instead: one generation in that many."""
    max_append_tokens: int = 1 << 20
    default_retention_ms: int = 3_600_000
    max_retention_ms: int = 30 * 24 * 3_600_000
    purged_ttl_ms: int = 600_000
    """How late after a purge a repeat of the request that made the session can come: until then it
    is refused. It costs some 200 bytes."""
    tombstone_ttl_ms: int = 60_000
    max_tombstones: int = 64
    max_attempts_without_progress: int = 2
    replica_record_ttl_ms: int = 3_600_000
    index_grace_ms: int = 10_000
    """Index entries are written before the records they point to: for so long they are not dropped,
    and no earlier entry has the sweep look at the record."""


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Tokens that one replica has written for a tenant since it began this sum. ``number`` tells
    its sums apart: it grows when it begins one anew."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What a tenant has used, as far as replicas have reported it."""

    minute_tokens: int
    """Left of its tokens for a minute; below 0 a debt."""
    ledger_tokens: int
    """In the ledgers of its sessions, closed ones too until they are purged."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep of due sessions did."""

    turns_expired: tuple[tuple[str, str], ...] = ()
    """(session id, turn id) ended FAILED because their deadline passed."""
    sessions_purged: tuple[str, ...] = ()
    examined: int = field(default=0)
