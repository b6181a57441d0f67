"""Streams of a turn: cursors over its journalled output (P15).

A cursor owns no queue. It remembers how far its client is and, whenever the transport takes
another message, sends everything released since as one message. So a slow client costs the run
nothing: it lags, gets fewer and larger messages, and never sees a gap.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from sessile.v1 import types_pb2 as pb

from gateway.core.errors import Overloaded
from statestore.records import FinishReason, Turn, TurnResult, TurnStatus
from workers.text.port import TextCodec
from workers.turn.ending import Broken, Ended, Ending, Redirected
from workers.turn.output import TurnOutput
from workers.turn.run import TurnRun

MAX_EVENTS_PER_MESSAGE = 16
"""Of MAX_TOKENS_PER_EVENT tokens each at most, a message stays under gRPC's 4 MiB."""

STATUS = {
    TurnStatus.RUNNING: pb.TURN_STATUS_RUNNING,
    TurnStatus.INTERRUPTED: pb.TURN_STATUS_INTERRUPTED,
    TurnStatus.COMMITTED: pb.TURN_STATUS_COMMITTED,
    TurnStatus.CANCELLED: pb.TURN_STATUS_CANCELLED,
    TurnStatus.FAILED: pb.TURN_STATUS_FAILED,
}
REASON = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


class Replay:
    """An ended turn, folded again from the ledger."""

    def __init__(self, turn: Turn, output: TurnOutput) -> None:
        self.output = output
        self.released = len(output.tokens)
        self.ending: Ending | None = Ended(turn)
        self.waiting = pb.TurnWaiting.REASON_UNSPECIFIED
        self.streams = 0

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    async def changed(self, timeout_s: float) -> bool:
        return True


TurnView = TurnRun | Replay
"""What a cursor follows: a live run, or an ended turn read from the ledger."""


async def stream_turn(
    view: TurnView,
    accepted: pb.TurnAccepted,
    first: int,
    *,
    codec: TextCodec,
    max_streams: int,
    waiting_interval_s: float,
) -> AsyncGenerator[pb.TurnStream, None]:
    """TurnAccepted, then the output tokens from index ``first`` on, then TurnFinished.

    Raises Overloaded over ``max_streams``, and the run's error if it breaks off; ends after a
    TurnRedirect if the turn was handed over.
    """
    if view.streams >= max_streams:
        raise Overloaded(f"{max_streams} streams follow this turn already", retry_after_ms=1000)
    view.attach()
    try:
        message = pb.TurnStream(events=[pb.TurnEvent(accepted=accepted)])
        sent = first
        while True:
            ending = view.ending
            if isinstance(ending, Broken):
                # At once: what a fenced run still has unsent may no longer be the ledger's (I4).
                raise ending.error
            sent = _add_tokens(message, view, sent)
            done = ending is not None and sent >= view.released
            if done and isinstance(ending, Ended):
                end = finished(ending.turn, view.output, codec)
                message.events.append(pb.TurnEvent(finished=end))
            elif done and isinstance(ending, Redirected):
                message.events.append(pb.TurnEvent(redirect=ending.redirect))
            if message.events:
                yield message
                message = pb.TurnStream()
            elif not await view.changed(waiting_interval_s):
                waiting = pb.TurnWaiting(reason=view.waiting)
                message.events.append(pb.TurnEvent(waiting=waiting))
            if done:
                return
    finally:
        view.detach()


def _add_tokens(message: pb.TurnStream, view: TurnView, sent: int) -> int:
    """Adds what is released after ``sent`` to the message; returns how far it goes."""
    while len(message.events) < MAX_EVENTS_PER_MESSAGE:
        event = view.output.event(sent, view.released)
        if event is None:
            break
        message.events.append(pb.TurnEvent(tokens=event))
        sent += len(event.token_ids)
    return sent


def accepted_event(turn: Turn, seed: int, *, cached_tokens: int, attached: bool) -> pb.TurnAccepted:
    """The first event of every stream."""
    accepted = pb.TurnAccepted(
        turn_id=turn.spec.turn_id,
        turn_index=turn.index,
        output_start=pb.Position(length=turn.output_start.length, digest=turn.output_start.digest),
        seed=seed,
        attempt=turn.attempt,
        cached_tokens=cached_tokens,
        attached=attached,
    )
    if turn.attempt_replica is not None:
        accepted.replica.replica_id = turn.attempt_replica.replica_id
        accepted.replica.incarnation = turn.attempt_replica.incarnation
    return accepted


def finished(turn: Turn, output: TurnOutput, codec: TextCodec) -> pb.TurnFinished:
    """The last event. ``output`` has ended where the turn ended."""
    result = turn.result or TurnResult(TurnStatus.FAILED, FinishReason.ERROR, error="no result")
    text, offset = output.tail
    event = pb.TurnFinished(
        status=STATUS[result.status],
        reason=REASON[result.reason],
        usage=usage_of(turn, output),
        end=pb.Position(length=turn.output_end.length, digest=turn.output_end.digest),
        text_end=output.text_end,
        error=result.error,
        text=text,
        text_offset=offset,
    )
    if result.reason is FinishReason.TOOL_CALLS:
        for call in codec.parse_tool_calls(output.text, turn.spec.turn_id):
            event.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments)
    return event


def usage_of(turn: Turn, output: TurnOutput) -> pb.Usage:
    """As committed; a turn that the store ended (cancel, deadline) is counted from the ledger."""
    if turn.result is not None and turn.result.usage:
        return pb.Usage.FromString(turn.result.usage)
    return pb.Usage(input_tokens=output.start.length, output_tokens=len(output.tokens))
