"""One turn, read as one stream through whatever gateways it takes.

async with session.run("Write a haiku.", max_tokens=64) as turn:
    async for event in turn:
        if isinstance(event, Tokens | Finished):
            print(event.text, end="")

result = await session.run("And another.").result()
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Literal, Self

from grpc import aio

from sessile import errors
from sessile.events import Accepted, Finished, Moved, Tokens, TurnEvent, TurnFold
from sessile.records import Position, TurnResult, TurnStatus
from sessile.tracing import TurnSpan
from sessile.transport import CLEANUP_S, Gateway, Transport
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

OnAbandon = Literal["cancel", "detach"]
"""What becomes of a turn whose reader goes away; see :class:`Turn`."""

DEFAULT_TIMEOUT_S = 600.0
"""The server's limit for a turn that names none."""
VERDICT_S = 5.0
"""The stream may outlive the turn's own time limit by this, so that the server's verdict on the
turn arrives before the call is given up."""


class Turn:
    """A turn being read: an async iterator of events, or :meth:`result` for all of it at once.

    Nothing is sent before the first event is asked for. A lost connection is made again, to the
    next gateway if there is one, and the stream goes on after the last token received.

    ``on_abandon`` decides what happens if the reading task is cancelled, if an ``async with`` block
    is left before the end, or on :meth:`aclose`: ``"cancel"`` (the default: nobody will read the
    rest) ends the turn, ``"detach"`` lets it run for the server's grace period, within which
    ``session.attach(turn.turn_id, resume_from=turn.position)`` goes on. A plain ``break`` out of
    ``async for`` cannot be noticed here: it always detaches. Not for concurrent use.
    """

    def __init__(
        self,
        transport: Transport,
        request: pb.RunTurnRequest,
        *,
        timeout_s: float | None,
        on_abandon: OnAbandon,
        on_end: Callable[[Accepted | None, Finished | None], None],
        model: str = "",
    ) -> None:
        self._transport = transport
        self._request = request
        self._timeout_s = timeout_s if timeout_s is not None else DEFAULT_TIMEOUT_S
        self._on_abandon = on_abandon
        self._on_end = on_end
        self._model = model
        self._span = TurnSpan()  # replaced when the turn is started
        self._attempts = transport.attempts(0.0)  # replaced when the turn is started
        self._fold = TurnFold(
            Position.from_pb(request.resume_from) if request.HasField("resume_from") else None
        )
        self._call: aio.UnaryStreamCall[pb.RunTurnRequest, pb.TurnStream] | None = None
        self._gateway: Gateway | None = None
        self._pending: deque[pb.TurnEvent] = deque()
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._finished_at: float | None = None
        self._streams = 0
        self._closed = False

    @property
    def turn_id(self) -> str:
        """The turn's idempotency key: :meth:`Session.attach` finds the turn by it."""
        return self._request.turn_id

    @property
    def position(self) -> Position | None:
        """After the last token received; None before the turn is accepted."""
        return self._fold.at

    @property
    def text(self) -> str:
        """Output text received so far."""
        return self._fold.text

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TurnEvent:
        """The next event. Raises SessileError; the turn itself may go on then (see the error)."""
        try:
            event = await self._next()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except errors.SessileError as error:
            self._span.failed(error, error.reason or type(error).__name__)
            self._drop()
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    async def result(self) -> TurnResult:
        """Reads to the end. A cancelled turn gives what it has, with ``status`` CANCELLED. Raises
        TurnFailed (which holds the result) if the turn failed, SessileError if it was not read."""
        async for _ in self:
            pass
        finished = self._fold.finished
        if finished is None:
            raise errors.WrongState(
                "the turn was abandoned before its end", hint="Attach to it by its turn id."
            )
        result = self._result(finished)
        if finished.status is TurnStatus.FAILED:
            raise errors.TurnFailed(finished.error or f"the turn ended: {finished.reason}", result)
        return result

    async def text_stream(self) -> AsyncGenerator[str, None]:
        """The output text alone, piece by piece, what was held back until the end included. Raises
        as :meth:`result` does. Leaving it early abandons the turn (see ``on_abandon``)."""
        try:
            async for event in self:
                if isinstance(event, Tokens | Finished) and event.text:
                    yield event.text
            await self.result()
        finally:
            await self.aclose()

    async def cancel(self) -> TurnStatus:
        """Ends the turn on the server; the stream then ends with ``Finished``. Idempotent. Returns
        how the turn ended (UNKNOWN if it had not begun: then it never will)."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.CancelTurn,
            lambda: session_pb2.CancelTurnRequest(
                session_id=self._request.session_id, turn_id=self._request.turn_id
            ),
        )
        return TurnStatus.from_pb(response.status)

    async def aclose(self) -> None:
        """Stops reading. Does to an unfinished turn what ``on_abandon`` says. Idempotent."""
        if self._closed:
            return
        unfinished = self._started_at is not None and self._fold.finished is None
        self._drop()
        if unfinished and self._on_abandon == "cancel":
            await self._transport.clean_up(self._cancel_within(CLEANUP_S))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _cancel_within(self, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await self.cancel()

    def _drop(self) -> None:
        """Lets go of the stream; the session forgets what it no longer knows for certain."""
        if self._closed:
            return
        self._closed = True
        self._pending.clear()
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._started_at is not None and self._fold.finished is None:
            self._on_end(self._fold.accepted, None)
            self._span.event("the end was not seen")
        self._span.end()

    async def _next(self) -> TurnEvent | None:
        """The next event to show, or None at the end."""
        while True:
            while self._pending:
                event = self._fold.take(self._pending.popleft())
                if event is not None:
                    self._note(event)
                    return event
            if self._closed:
                return None
            if self._fold.finished is not None:
                self._drop()
                return None
            await self._receive()

    async def _receive(self) -> None:
        """Fills ``_pending`` from the stream, opened or opened again first if need be."""
        runtime = self._transport.runtime
        if self._started_at is None:
            self._started_at = runtime.now()
            self._attempts = self._transport.attempts(self._timeout_s + VERDICT_S)
            self._span = self._transport.tracing.turn(
                self._request.session_id, self.turn_id, self._model
            )
        if self._call is None:
            self._open()
        assert self._call is not None
        assert self._gateway is not None
        try:
            message = await self._call.read()
            if isinstance(message, pb.TurnStream):
                self._pending.extend(message.events)
                if any(event.HasField("tokens") for event in message.events):
                    self._attempts.progressed()
                if any(event.HasField("redirect") for event in message.events):
                    await self._follow_redirect()
                return
            error: errors.SessileError = errors.Unavailable("the stream ended before the turn did")
        except aio.AioRpcError as rpc_error:
            error = errors.from_rpc(rpc_error)
        self._call = None
        if isinstance(error, errors.NotFound) and self._fold.accepted and self._streams > 1:
            raise errors.DataLoss(
                "the turn was accepted and is no longer in the ledger",
                reason="DATA_LOSS",
                hint="Fork from the last turn that the transcript shows.",
            ) from error
        await self._attempts.failed(error, self._gateway)

    async def _follow_redirect(self) -> None:
        """The turn goes on elsewhere: any gateway finds it. Not asked for (``accepts_redirect``):
        the endpoint it may name is a replica's, which takes calls from gateways only."""
        assert self._call is not None
        assert self._gateway is not None
        self._call.cancel()
        self._call = None
        self._span.event("redirected")
        error = errors.Unavailable("the turn was redirected time and again without progress.")
        await self._attempts.failed(error, self._gateway, leave=False)

    def _open(self) -> None:
        self._gateway = self._transport.gateway
        self._transport.warm_next()
        self._fold.reconnected()
        self._streams += 1
        if self._streams > 1:
            self._span.event("connected again", gateway=self._gateway.target)
        self._call = self._gateway.sessions.RunTurn(
            self._next_request(),
            timeout=self._attempts.time_left_s(),
            metadata=(*self._transport.metadata, *self._span.headers()),
        )

    def _next_request(self) -> pb.RunTurnRequest:
        """The request as given until the turn is accepted, then one that attaches: it must not
        begin the turn a second time, on a ledger that lost the first."""
        if self._fold.accepted is None or self._fold.at is None:
            return self._request
        return pb.RunTurnRequest(
            session_id=self._request.session_id,
            turn_id=self._request.turn_id,
            timeout_ms=self._request.timeout_ms,
            priority=self._request.priority,
            resume_from=self._fold.at.to_pb(),
            attach_only=True,
        )

    def _note(self, event: TurnEvent) -> None:
        now = self._transport.runtime.now()
        if isinstance(event, Tokens) and self._first_token_at is None:
            self._first_token_at = now
            self._span.event("first token")
        elif isinstance(event, Moved):
            self._span.event("moved", target=event.target.replica_id)
        elif isinstance(event, Finished):
            self._finished_at = now
            self._span.finished(
                event.status.name.lower(), str(event.reason), event.usage, event.error
            )
            self._span.end()
            self._on_end(self._fold.accepted, event)

    def _result(self, finished: Finished) -> TurnResult:
        fold, began = self._fold, self._started_at or 0.0
        ended = began if self._finished_at is None else self._finished_at
        first = self._first_token_at
        return TurnResult(
            turn_id=self.turn_id,
            turn_index=fold.accepted.turn_index if fold.accepted else 0,
            status=finished.status,
            finish_reason=finished.reason,
            text=fold.text,
            token_ids=tuple(fold.token_ids),
            tool_calls=finished.tool_calls,
            usage=finished.usage,
            end=finished.end,
            ttft_ms=None if first is None else (first - began) * 1000,
            duration_ms=(ended - began) * 1000,
            moves=fold.moves,
            reconnects=max(self._streams - 1, 0),
            error=finished.error,
        )
