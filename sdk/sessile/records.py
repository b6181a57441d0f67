"""What a client reads back: places in a ledger, sessions, results and transcripts."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sessile.messages import Message, ToolCall
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

E = TypeVar("E", bound=enum.Enum)


def enum_from_pb(cls: type[E], name_of: Callable[[Any], str], number: int, prefix: str) -> E:
    """The member with the wire's name; ``UNKNOWN`` for one of a newer server."""
    try:
        return cls[name_of(number).removeprefix(prefix)]
    except (ValueError, KeyError):
        return cls["UNKNOWN"]


class SessionState(enum.StrEnum):
    """Life of a session."""

    OPEN = "open"
    SUSPENDED = "suspended"
    CLOSED = "closed"
    UNKNOWN = "unknown"


class TurnStatus(enum.StrEnum):
    """Life of a turn."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"

    @classmethod
    def from_pb(cls, number: int) -> TurnStatus:
        return enum_from_pb(cls, pb.TurnStatus.Name, number, "TURN_STATUS_")


class FinishReason(enum.StrEnum):
    """Why a turn ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    UNKNOWN = "unknown"

    @classmethod
    def from_pb(cls, number: int) -> FinishReason:
        return enum_from_pb(cls, pb.FinishReason.Name, number, "FINISH_REASON_")


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a ledger: ``length`` tokens precede it. ``digest`` (opaque, 16 bytes or empty)
    tells it from the same place in another history."""

    length: int
    digest: bytes = b""

    def to_pb(self) -> pb.Position:
        return pb.Position(length=self.length, digest=self.digest)

    @classmethod
    def from_pb(cls, position: pb.Position) -> Position:
        return cls(position.length, position.digest)

    def contradicts(self, other: Position) -> bool:
        """Same place, other history."""
        known = bool(self.digest and other.digest)
        return self.length == other.length and known and self.digest != other.digest


@dataclass(frozen=True, slots=True)
class ReplicaRef:
    """One replica process; a restarted replica is another incarnation."""

    replica_id: str
    incarnation: int

    def __str__(self) -> str:
        return self.replica_id

    @classmethod
    def from_pb(cls, ref: pb.ReplicaRef) -> ReplicaRef:
        return cls(ref.replica_id, ref.incarnation)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a turn. ``input_tokens`` is the whole context before the first output token, of
    which ``cached_tokens`` were found in the KV cache."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def from_pb(cls, usage: pb.Usage) -> Usage:
        return cls(usage.input_tokens, usage.cached_tokens, usage.output_tokens)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as the store had it. Instants are Unix milliseconds of the store's clock."""

    session_id: str
    model: str
    state: SessionState
    owner: ReplicaRef | None
    head: Position
    turn_index: int
    """Turns ended so far."""
    active_turn_id: str
    parent_id: str
    labels: Mapping[str, str]
    created_at_ms: int
    updated_at_ms: int
    migrating_to: str
    ledger_bytes: int = 0
    """What its own ledger takes in the store; inherited tokens count with the ancestor."""

    @classmethod
    def from_pb(cls, session: session_pb2.Session) -> SessionInfo:
        return cls(
            session_id=session.session_id,
            model=session.model,
            state=enum_from_pb(
                SessionState, session_pb2.SessionState.Name, session.state, "SESSION_STATE_"
            ),
            owner=(
                ReplicaRef.from_pb(session.owner.replica) if session.HasField("owner") else None
            ),
            head=Position.from_pb(session.head),
            turn_index=session.turn_index,
            active_turn_id=session.active_turn_id,
            parent_id=session.parent_id,
            labels=dict(session.labels),
            created_at_ms=session.created_at_unix_ms,
            updated_at_ms=session.updated_at_unix_ms,
            migrating_to=session.migrating_to,
            ledger_bytes=session.ledger_bytes,
        )


@dataclass(frozen=True, slots=True)
class TurnResult:
    """A whole turn. After ``attach(resume_from=...)`` text and tokens start there."""

    turn_id: str
    turn_index: int
    status: TurnStatus
    """COMMITTED, CANCELLED or FAILED."""
    finish_reason: FinishReason
    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    tool_calls: tuple[ToolCall, ...]
    usage: Usage
    end: Position
    """End of the ledger after the turn."""
    ttft_ms: float | None
    """From the call to the first token received; None if there was none."""
    duration_ms: float
    moves: int
    """How often the turn went on on another replica."""
    reconnects: int
    """How often this client connected again in mid-turn."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class TranscriptTurn:
    """One turn of a transcript; spans are positions in the ledger."""

    turn_id: str
    turn_index: int
    status: TurnStatus
    input: tuple[Message, ...]
    output_text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    input_start: int
    output_start: int
    output_end: int
    token_ids: tuple[int, ...]
    """Input, then output tokens, if asked for."""
    attempts: int
    error: str

    @classmethod
    def from_pb(cls, turn: session_pb2.TranscriptTurn) -> TranscriptTurn:
        return cls(
            turn_id=turn.turn_id,
            turn_index=turn.turn_index,
            status=TurnStatus.from_pb(turn.status),
            input=tuple(Message.from_pb(message) for message in turn.input),
            output_text=turn.output_text,
            tool_calls=tuple(ToolCall.from_pb(call) for call in turn.tool_calls),
            finish_reason=FinishReason.from_pb(turn.reason),
            usage=Usage.from_pb(turn.usage),
            input_start=turn.input_start,
            output_start=turn.output_start,
            output_end=turn.output_end,
            token_ids=tuple(turn.token_ids),
            attempts=turn.attempts,
            error=turn.error,
        )
