"""The events of a turn, and the check that they are one gapless stream.

A turn shows ``Accepted``, then ``Tokens`` whose positions follow one another, with ``Waiting`` and
``Moved`` in between, then ``Finished``. :class:`TurnFold` checks this over every connection that
the turn was read through; nothing is dropped or repeated silently.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sessile.errors import DataLoss, ProtocolError
from sessile.messages import ToolCall
from sessile.records import (
    FinishReason,
    Position,
    ReplicaRef,
    TurnStatus,
    Usage,
    enum_from_pb,
)
from sessile.v1 import types_pb2 as pb


class WaitReason(enum.StrEnum):
    """What a turn waits for."""

    QUEUED = "queued"
    STORE = "store"
    FAILOVER = "failover"
    KV_TRANSFER = "kv_transfer"
    UNKNOWN = "unknown"


class MoveReason(enum.StrEnum):
    """Why a turn went on elsewhere."""

    FAILOVER = "failover"
    MIGRATION = "migration"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is in the ledger: from here on it survives any single failure."""

    turn_id: str
    turn_index: int
    output_start: Position
    seed: int
    attempt: int
    replica: ReplicaRef
    cached_tokens: int
    attached: bool
    """The turn existed before this call."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Alive; nothing can be sent yet."""

    reason: WaitReason


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens that are in the ledger, and the text that they released."""

    position: int
    """Of the first token, in the ledger."""
    token_ids: tuple[int, ...]
    text: str
    text_offset: int
    """Of ``text`` in the turn's output text, in code points."""
    end: Position
    """The ledger after the last token: ``resume_from`` of a later ``attach``."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The turn goes on on another replica. Nothing is lost or repeated."""

    source: ReplicaRef
    target: ReplicaRef
    reason: MoveReason
    attempt: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn ended; the last event."""

    status: TurnStatus
    reason: FinishReason
    usage: Usage
    end: Position
    text: str
    """Text that was held back until now; part of the output text."""
    text_offset: int
    tool_calls: tuple[ToolCall, ...]
    error: str


TurnEvent = Accepted | Waiting | Tokens | Moved | Finished


_ENDED = frozenset({TurnStatus.COMMITTED, TurnStatus.CANCELLED, TurnStatus.FAILED})
MAX_LENGTH = 2**63
"""Of a ledger, tokens: what does not fit could not be sent back as a position."""


class TurnFold:
    """What a client has of one turn: text, tokens and the place reached.

    Raises ProtocolError where a stream is no continuation of what is here, DataLoss where the
    ledger no longer holds it.
    """

    def __init__(self, resume_from: Position | None) -> None:
        self.at = resume_from
        """After the last token received; None until the first Accepted."""
        self.accepted: Accepted | None = None
        self.finished: Finished | None = None
        self.token_ids: list[int] = []
        self.moves = 0
        self._text: list[str] = []
        self._text_end: int | None = None if resume_from else 0
        self._replica: ReplicaRef | None = None
        self._stream_began = False

    @property
    def text(self) -> str:
        return "".join(self._text)

    def reconnected(self) -> None:
        """What follows comes from a new stream: it begins with Accepted again."""
        self._stream_began = False

    def take(self, event: pb.TurnEvent) -> TurnEvent | None:
        """Checks and folds one event; None if the caller need not see it (an Accepted repeated by
        a new connection, a kind that this version does not know)."""
        if self.finished is not None:
            raise ProtocolError("an event after TurnFinished")
        match event.WhichOneof("event"):
            case "accepted":
                return self._take_accepted(event.accepted)
            case "tokens":
                return self._take_tokens(event.tokens)
            case "moved":
                return self._take_moved(event.moved)
            case "finished":
                return self._take_finished(event.finished)
            case "waiting":
                return Waiting(
                    enum_from_pb(
                        WaitReason, pb.TurnWaiting.Reason.Name, event.waiting.reason, "REASON_"
                    )
                )
        return None

    def _take_accepted(self, accepted: pb.TurnAccepted) -> Accepted | Moved | None:
        if self._stream_began:
            raise ProtocolError("TurnAccepted twice in one stream")
        self._stream_began = True
        start = Position.from_pb(accepted.output_start)
        replica, before = ReplicaRef.from_pb(accepted.replica), self._replica
        self._replica = replica
        if self.accepted is not None:
            first = self.accepted.output_start
            if start.length != first.length or start.contradicts(first):
                raise DataLoss("the turn's output starts elsewhere in the ledger than before")
            if before is None or before == replica:
                return None
            self.moves += 1
            return Moved(before, replica, MoveReason.FAILOVER, accepted.attempt)
        if self.at is None:
            self.at = start
        elif self.at.length < start.length or self.at.contradicts(start):
            raise ProtocolError("resume_from is not a place in this turn's output")
        self.accepted = Accepted(
            turn_id=accepted.turn_id,
            turn_index=accepted.turn_index,
            output_start=start,
            seed=accepted.seed,
            attempt=accepted.attempt,
            replica=replica,
            cached_tokens=accepted.cached_tokens,
            attached=accepted.attached,
        )
        return self.accepted

    def _take_tokens(self, tokens: pb.TurnTokens) -> Tokens:
        if not self._stream_began or self.at is None:
            raise ProtocolError("tokens before TurnAccepted")
        if tokens.position != self.at.length:
            kind = "gap" if tokens.position > self.at.length else "repeat"
            raise ProtocolError(
                f"{kind}: tokens at position {tokens.position}, expected {self.at.length}"
            )
        ids = tuple(tokens.token_ids)
        if tokens.position + len(ids) > MAX_LENGTH:
            raise ProtocolError(f"no ledger is as long as {tokens.position} tokens")
        self._take_text(tokens.text, tokens.text_offset)
        self.at = Position(tokens.position + len(ids), tokens.digest)
        self.token_ids.extend(ids)
        return Tokens(tokens.position, ids, tokens.text, tokens.text_offset, self.at)

    def _take_moved(self, moved: pb.TurnMoved) -> Moved:
        self.moves += 1
        source, target = ReplicaRef.from_pb(getattr(moved, "from")), ReplicaRef.from_pb(moved.to)
        self._replica = target
        reason = enum_from_pb(MoveReason, pb.TurnMoved.Reason.Name, moved.reason, "REASON_")
        return Moved(source, target, reason, moved.attempt)

    def _take_finished(self, finished: pb.TurnFinished) -> Finished:
        if not self._stream_began:
            raise ProtocolError("TurnFinished before TurnAccepted")
        status, end = TurnStatus.from_pb(finished.status), Position.from_pb(finished.end)
        if status not in _ENDED:
            raise ProtocolError(f"TurnFinished with status {finished.status}, which is no end")
        if self.at is not None:
            if end.length < self.at.length or end.contradicts(self.at):
                raise DataLoss(
                    f"the ledger of the turn ends at {end.length}, {self.at.length} were received"
                )
            # A cancel or a failure may end the ledger after what was delivered; a result may not.
            if end.length > self.at.length and status is TurnStatus.COMMITTED:
                raise ProtocolError(
                    f"gap: the turn ends at {end.length}, received up to {self.at.length}"
                )
        self._take_text(finished.text, finished.text_offset)
        if status is TurnStatus.COMMITTED and self._text_end not in (None, finished.text_end):
            raise ProtocolError(
                f"the text ends at {finished.text_end}, received up to {self._text_end}"
            )
        self.finished = Finished(
            status=status,
            reason=FinishReason.from_pb(finished.reason),
            usage=Usage.from_pb(finished.usage),
            end=end,
            text=finished.text,
            text_offset=finished.text_offset,
            tool_calls=tuple(ToolCall.from_pb(call) for call in finished.tool_calls),
            error=finished.error,
        )
        return self.finished

    def _take_text(self, text: str, offset: int) -> None:
        if not text:
            return
        if self._text_end is not None and offset != self._text_end:
            raise ProtocolError(f"text at offset {offset}, expected {self._text_end}")
        self._text.append(text)
        self._text_end = offset + len(text)
