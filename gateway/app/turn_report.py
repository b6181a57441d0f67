"""What is said of one RunTurn stream: its spans, and what it adds to the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.trace import SpanKind
from sessile.v1 import types_pb2 as pb

from gateway.app.assignment import Assignment
from gateway.app.frames import BadFrame, event_of
from gateway.app.relay import Outbox
from gateway.app.services import Services
from gateway.app.tracing import placement_attributes
from gateway.telemetry import attributes as a
from gateway.telemetry.tracing import Spans
from statestore.records import ReplicaRef


class TurnReport:
    """Of one stream, by the task that serves it. Decides nothing."""

    def __init__(self, services: Services, tenant: str, session_id: str, priority: str) -> None:
        self._tracing = services.tracing
        self._metrics = services.metrics
        self._clock = services.clock
        self._tenant = tenant
        self._session_id = session_id
        self._priority = priority
        self._began = services.clock.now()
        self._model = ""
        self._failover: tuple[float, str, Spans] | None = None
        """When the lost owner was last heard, why it is taken for lost, and the span of it."""
        self.end: bytes | None = None
        """The event TurnFinished, once it has come."""

    @contextmanager
    def of_turn(self, turn_id: str, outbox: Outbox) -> Iterator[None]:
        """Around the whole stream, which ends as ``outbox`` does."""
        says = {
            **a.CHAT,
            a.TURN: turn_id,
            a.TENANT: self._tenant,
            a.PRIORITY: self._priority,
        }
        with self._tracing.session_span("turn", self._session_id, says, SpanKind.SERVER) as spans:
            try:
                yield
            finally:
                finished = _finished(self.end)
                self._end_failover(done=finished is not None)
                spans.set({a.MODEL: self._model})
                if finished is not None:
                    _describe(spans, finished)
                elif outbox.failure is None:
                    spans.event("no end was seen")  # the client left, or was redirected
                self._metrics.stream_ended(
                    self._model,
                    self._tenant,
                    self._clock.now() - self._began,
                    "" if finished is None else _status(finished),
                    "" if outbox.failure is None else outbox.failure.reason,
                )

    def placed(self, span: Spans, assignment: Assignment, cause: str) -> None:
        """What was decided; if the owner was found to be somebody already, only who."""
        span.set({a.REPLICA: str(assignment.replica.ref)})
        if assignment.decision is not None:
            self._metrics.epoch_taken(cause)
            span.set({a.CAUSE: cause, **placement_attributes(assignment.decision)})

    def dispatching(self, assignment: Assignment) -> AbstractContextManager[Spans]:
        """Around one dispatch. Whoever does not set another outcome has given it up."""
        replica = assignment.replica
        self._model = replica.details.model
        says = {
            **a.CHAT,
            a.MODEL: self._model,
            a.REPLICA: str(replica.ref),
            "server.address": replica.details.endpoint,
            a.OUTCOME: "given up",
        }
        return self._tracing.span("dispatch", self._session_id, says, SpanKind.CLIENT)

    def first_tokens(self, *, again: bool) -> None:
        """The first ones of a dispatch; ``again``: the turn has had some before."""
        if not again:
            after_s = self._clock.now() - self._began
            self._metrics.first_token(self._model, self._tenant, self._priority, after_s)
        self._end_failover(done=True)

    def lost(self, replica: ReplicaRef, refused: bool, why: str, *, last_heard: float) -> None:
        """A stream broke. The fail-over lasts until tokens come again, however many replicas are
        tried on the way."""
        if self._failover is not None:
            self._failover[2].event("lost again", {a.REPLICA: str(replica), "sessile.why": why})
            return
        cause = "refused" if refused else "broken"
        says = {a.REPLICA: str(replica), a.CAUSE: cause, "sessile.why": why}
        ago_s = self._clock.now() - last_heard
        span = self._tracing.start("failover", self._session_id, says, ago_s=ago_s)
        self._failover = last_heard, cause, span

    def _end_failover(self, *, done: bool) -> None:
        if self._failover is None:
            return
        (lost_at, cause, span), self._failover = self._failover, None
        if done:
            self._metrics.failed_over(self._clock.now() - lost_at, cause)
        else:
            span.fail("nobody went on with the turn while this stream was open", kind="abandoned")
        span.end()


def _finished(event: bytes | None) -> pb.TurnFinished | None:
    """None as well for an event that no receiver could read."""
    if event is None:
        return None
    try:
        return event_of(event).finished
    except BadFrame:
        return None


def _status(finished: pb.TurnFinished) -> str:
    """``committed``, ``cancelled`` or ``failed``."""
    return pb.TurnStatus.Name(finished.status).removeprefix("TURN_STATUS_").lower()


def _describe(spans: Spans, finished: pb.TurnFinished) -> None:
    reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    spans.set(
        {
            a.STATUS: _status(finished),
            a.FINISH_REASONS: [reason],
            a.INPUT_TOKENS: finished.usage.input_tokens,
            a.CACHED_TOKENS: finished.usage.cached_tokens,
            a.OUTPUT_TOKENS: finished.usage.output_tokens,
        }
    )
    if finished.status == pb.TURN_STATUS_FAILED:
        spans.fail(finished.error, kind=reason)
