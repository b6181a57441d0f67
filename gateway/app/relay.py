"""From a replica's stream to a client's: bytes through, coalesced, with a bound.

``Outbox`` is the buffer between the task that reads the replica and the task that writes to the
client: whatever is there when a write completes goes out as one message. ``TurnCursor`` knows how
far the client's stream is, from event boundaries alone; tokens are parsed only when a stream broke.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from sessile.v1 import types_pb2 as pb

from gateway.app.frames import BadFrame, Kind, event_of, events, frame
from gateway.core.errors import SessileError

MAX_POSITION = (1 << 64) - 1

Sink = Callable[[bytes], Awaitable[None]]
"""Writes one message to the client; returns when the transport has taken it."""


class Outbox:
    """Bytes that wait for the client, ``limit_bytes`` at most (one message more at the edge).

    One task puts, one task drains. Over the limit :meth:`put` waits: the replica's stream is then
    paused by its transport's flow control, while the turn itself runs on.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._closed = False
        self._failure: SessileError | None = None
        self._filled = anyio.Event()
        self._emptied = anyio.Event()

    @property
    def full(self) -> bool:
        return self._bytes >= self._limit_bytes

    @property
    def failure(self) -> SessileError | None:
        """What the stream ends with, once it is closed."""
        return self._failure

    async def put(self, chunk: bytes) -> None:
        """Queues a message, then waits until there is room for another: who is cancelled in the
        wait has not lost what the cursor counts as delivered."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        self._filled.set()
        while self.full:
            self._emptied = anyio.Event()
            await self._emptied.wait()

    def close(self, failure: SessileError | None = None) -> None:
        """Nothing more follows; what is queued is still sent, then ``failure`` ends the stream."""
        self._closed = True
        self._failure = failure
        self._filled.set()

    async def drain_to(self, sink: Sink) -> SessileError | None:
        """Sends until closed and empty; returns what the stream is to end with."""
        while True:
            if self._chunks:
                chunks, self._chunks, self._bytes = self._chunks, [], 0
                self._emptied.set()
                await sink(chunks[0] if len(chunks) == 1 else b"".join(chunks))
            elif self._closed:
                return self._failure
            else:
                self._filled = anyio.Event()
                await self._filled.wait()


class TurnCursor:
    """How far one client's stream of one turn is.

    :meth:`feed` passes a replica's message on, minus what the client must not see: a second
    TurnAccepted (after a fail-over it becomes TurnMoved) and, unless asked for, TurnRedirect.
    """

    def __init__(self, resume_from: pb.Position | None, accepts_redirect: bool) -> None:
        self._resume_from = resume_from
        self._accepts_redirect = accepts_redirect
        self._began: pb.Position | None = None
        self._last_tokens = b""
        self._replica = pb.ReplicaRef()
        self.accepted = False
        self.attached = False
        """The turn was there before this stream."""
        self.finished = False
        self.end: bytes | None = None
        """The event TurnFinished."""
        self.redirect: pb.TurnRedirect | None = None
        self.moved_because = pb.TurnMoved.REASON_FAILOVER
        self.token_messages = 0
        """Messages with tokens so far: to see whether an attempt made progress."""

    def feed(self, message: bytes) -> bytes:
        """The bytes to send to the client (may be empty). Raises BadFrame."""
        kept: list[bytes] = []
        whole = True
        for kind, start, end in events(message):
            if kind is Kind.TOKENS:
                self._last_tokens = message[start:end]
                self.token_messages += 1
                kept.append(self._last_tokens)
                continue
            event = message[start:end]
            passed = self._pass(kind, event)
            whole = whole and passed is event
            if passed:
                kept.append(passed)
        return message if whole else b"".join(kept)

    def position(self) -> pb.Position | None:
        """Where to resume: after the last token received, else where the turn's output was said to
        begin; None: from the turn's first output. Raises BadFrame."""
        if not self._last_tokens:
            return self._resume_from or self._began
        tokens = event_of(self._last_tokens).tokens
        length = tokens.position + len(tokens.token_ids)
        if length > MAX_POSITION:
            raise BadFrame(f"tokens from {tokens.position} on end past the last position")
        return pb.Position(length=length, digest=tokens.digest)

    def _pass(self, kind: Kind, event: bytes) -> bytes | None:
        """What becomes of an event that is not tokens; None drops it."""
        if kind is Kind.FINISHED:
            self.finished, self.end = True, event
        elif kind is Kind.ACCEPTED:
            return self._accepted(event)
        elif kind is Kind.REDIRECT:
            self.redirect = event_of(event).redirect
            if not self._accepts_redirect:
                return None
            self.finished = True
        return event

    def _accepted(self, event: bytes) -> bytes | None:
        accepted = event_of(event).accepted
        before, self._replica = self._replica, accepted.replica
        if not self.accepted:
            self.accepted, self.attached = True, accepted.attached
            self._began = accepted.output_start
            return event
        if before == accepted.replica:
            return None
        reason, self.moved_because = self.moved_because, pb.TurnMoved.REASON_FAILOVER
        moved = pb.TurnMoved(
            to=accepted.replica, reason=reason, attempt=accepted.attempt, **{"from": before}
        )
        return frame(pb.TurnEvent(moved=moved))
