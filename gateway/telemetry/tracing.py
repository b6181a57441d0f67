"""Spans of sessions, so that one search finds a session's life whoever's traces it is spread over.

A session has a trace of its own, whose id follows from the session's: every process knows it and
none has to keep it. What happens to a session while no caller brings a trace of its own goes there.
A caller's trace wins: then the work is in the caller's trace, with a link to the session's, and the
session's trace gets one span of the same name and times, with a link to the work. Every span has
the session's id. See docs/adr/0017.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from gateway.telemetry.attributes import CONVERSATION_ID, ERROR_TYPE, SESSION

Value = str | bool | int | float | Sequence[str] | Sequence[float]
Attributes = Mapping[str, Value]

MAX_ATTRIBUTE_CHARS = 256
"""Of an error's text on a span."""

forced_ids: ContextVar[SpanContext | None] = ContextVar("forced_ids", default=None)
"""The ids of the span that is being started, if it may not choose; see ``setup.py``."""


def session_context(session_id: str, sampled: bool = True) -> SpanContext:
    """Trace and root span of a session."""
    digest = hashlib.blake2b(session_id.encode(), digest_size=24, person=b"sessile-trace").digest()
    return SpanContext(
        trace_id=int.from_bytes(digest[:16]) or 1,
        span_id=int.from_bytes(digest[16:]) or 1,
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT),
    )


class Spans:
    """One span, or the one in the caller's trace and that in the session's own."""

    __slots__ = ("_spans",)

    def __init__(self, *spans: Span) -> None:
        self._spans = spans

    @property
    def recording(self) -> bool:
        return any(span.is_recording() for span in self._spans)

    def set(self, attributes: Attributes) -> None:
        for span in self._spans:
            span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        for span in self._spans:
            span.add_event(name, attributes)

    def fail(self, error: BaseException | str, kind: str = "") -> None:
        """``kind``: a short name; by default the error's reason, or its class."""
        kind = kind or getattr(error, "reason", "") or type(error).__name__
        for span in self._spans:
            span.set_attribute(ERROR_TYPE, kind)
            span.set_status(Status(StatusCode.ERROR, str(error)[:MAX_ATTRIBUTE_CHARS]))

    def end(self) -> None:
        for span in self._spans:
            span.end()


NO_SPANS = Spans()
NOTHING: AbstractContextManager[Spans] = nullcontext(NO_SPANS)
"""Around what is not traced. Has no state, so one is enough."""


class Tracing:
    """Makes spans of one part of the system (``scope``). Without an SDK in the process it does
    next to nothing, and a caller's context stays the current one."""

    def __init__(self, scope: str, provider: trace.TracerProvider | None = None) -> None:
        provider = provider or trace.get_tracer_provider()
        self._tracer = trace.get_tracer(scope, tracer_provider=provider)
        self._sampler = getattr(provider, "sampler", None)  # the API has none
        self._forces_ids = hasattr(getattr(provider, "id_generator", None), "forces_ids")

    @property
    def on(self) -> bool:
        """Whether anything is recorded at all."""
        return self._sampler is not None

    # -- spans within what is under way --------------------------------------------------------

    def span(
        self,
        name: str,
        session_id: str,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> AbstractContextManager[Spans]:
        """A child of the current span, and the current one within the block. An exception is its
        failure; the end of a cancelled task is none."""
        if self._sampler is None:
            return NOTHING
        span = self._tracer.start_span(name, kind=kind, attributes=_of(session_id, attributes))
        return _current(span, Spans(span))

    def start(
        self,
        name: str,
        session_id: str,
        attributes: Attributes | None = None,
        *,
        ago_s: float = 0.0,
    ) -> Spans:
        """A child of the current span that began ``ago_s`` ago and is ended by its owner."""
        if self._sampler is None:
            return NO_SPANS
        began = None if not ago_s else time.time_ns() - round(ago_s * 1e9)
        return Spans(
            self._tracer.start_span(name, attributes=_of(session_id, attributes), start_time=began)
        )

    def past(
        self,
        name: str,
        session_id: str,
        *,
        ago_s: float,
        lasted_s: float,
        attributes: Attributes | None = None,
    ) -> None:
        """A child of the current span that is over already."""
        if self._sampler is None:
            return
        began = time.time_ns() - round(ago_s * 1e9)
        span = self._tracer.start_span(
            name, attributes=_of(session_id, attributes), start_time=began
        )
        span.end(began + max(0, round(lasted_s * 1e9)))

    # -- spans of a session's life -------------------------------------------------------------

    def session_span(
        self,
        name: str,
        session_id: str,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> AbstractContextManager[Spans]:
        """A span of the session's life, current within the block: in the caller's trace if there is
        one, and always in the session's."""
        if self._sampler is None:
            return NOTHING
        own, caller = self.session(session_id), trace.get_current_span().get_span_context()
        attributes = _of(session_id, attributes)
        if not caller.is_valid or caller.trace_id == own.trace_id:
            parent = None if caller.is_valid else _under(own)
            span = self._tracer.start_span(name, parent, kind, attributes)
            spans = Spans(span)
        else:
            span = self._tracer.start_span(name, None, kind, attributes, links=[Link(own)])
            link = Link(span.get_span_context())
            spans = Spans(
                span, self._tracer.start_span(name, _under(own), kind, attributes, [link])
            )
        return _current(span, spans)

    def resumed_span(
        self,
        name: str,
        session_id: str,
        traceparent: str,
        attributes: Attributes | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> AbstractContextManager[Spans]:
        """A child of the current span if that is in the trace of ``traceparent`` (or that is
        empty), else a child of the latter, with a link to the current span: whoever happens to
        carry something on, it stays in its trace."""
        began = _parsed(traceparent) if self._sampler is not None and traceparent else None
        current = trace.get_current_span().get_span_context()
        if began is None or began.trace_id == current.trace_id:
            return self.span(name, session_id, attributes, kind)
        links = [Link(current)] if current.is_valid else []
        attributes = _of(session_id, attributes)
        span = self._tracer.start_span(name, _under(began), kind, attributes, links)
        return _current(span, Spans(span))

    def session(self, session_id: str) -> SpanContext:
        """Where the session's own spans go; sampled as this process's sampler decides by the
        trace's id, so the same in every process that has the same sampler."""
        context = session_context(session_id)
        if self._sampler is None:
            return context
        result = self._sampler.should_sample(Context(), context.trace_id, "session")
        return context if result.decision.is_sampled() else session_context(session_id, False)

    def opened(
        self, session_id: str, parent_id: str | None, attributes: Attributes | None = None
    ) -> None:
        """The root of a new session's trace, with a link to that of the session it is forked from.
        Written once, by whoever opened it."""
        if self._sampler is None or not self._forces_ids:
            return
        links = [Link(self.session(parent_id))] if parent_id else []
        token = forced_ids.set(session_context(session_id))
        try:
            span = self._tracer.start_span(
                "session", Context(), attributes=_of(session_id, attributes), links=links
            )
        finally:
            forced_ids.reset(token)
        span.end()

    def gap(self, session_id: str, name: str, began_ms: int, ended_ms: int) -> None:
        """A time in a session's life in which nobody worked on it (Unix ms; none if it began at 0),
        in its own trace, with a link to the current span, which ended it."""
        if self._sampler is None or not 0 < began_ms < ended_ms:
            return
        current = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            name,
            _under(self.session(session_id)),
            attributes=_of(session_id, None),
            links=[Link(current)] if current.is_valid else [],
            start_time=began_ms * 1_000_000,
        )
        span.end(ended_ms * 1_000_000)


def traceparent() -> str:
    """Of the current span if it is sampled, for who may have to go on with its work; else empty."""
    if not trace.get_current_span().get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def _parsed(text: str) -> SpanContext | None:
    context = propagate.extract({"traceparent": text}, Context())
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None


def _under(parent: SpanContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _of(session_id: str, attributes: Attributes | None) -> dict[str, Value]:
    return {SESSION: session_id, CONVERSATION_ID: session_id, **(attributes or {})}


@contextmanager
def _current(span: Span, spans: Spans) -> Iterator[Spans]:
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        try:
            yield spans
        except Exception as error:
            spans.fail(error)
            raise
        finally:
            spans.end()
