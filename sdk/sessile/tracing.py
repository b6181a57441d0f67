"""The client's part of a trace: a span for each turn, and W3C trace headers on every call.

Works if OpenTelemetry's API is installed (``pip install opentelemetry-api``; with an SDK that the
application has set up, spans are recorded), and does nothing otherwise. Names of attributes are
those of OpenTelemetry's conventions for generative AI.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from sessile.records import Usage

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

try:
    from opentelemetry import propagate, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError:  # optional
    AVAILABLE = False
else:
    AVAILABLE = True

Metadata = tuple[tuple[str, str], ...]

MAX_ERROR_CHARS = 256
"""Of an error's text on a span."""


class TurnSpan:
    """One turn as its client sees it, through all its streams. Nothing without a span."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    def headers(self) -> Metadata:
        """For calls that belong to the turn."""
        if self._span is None:
            return ()
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self._span))
        return tuple(carrier.items())

    def event(self, name: str, **attributes: str | int) -> None:
        if self._span is not None:
            says = {f"sessile.{key}": value for key, value in attributes.items()}
            self._span.add_event(name, says)

    def finished(self, status: str, reason: str, usage: Usage, error: str) -> None:
        """The turn's end was received."""
        if self._span is None:
            return
        self._span.set_attributes(
            {
                "sessile.status": status,
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.input_tokens": usage.input_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.usage.output_tokens": usage.output_tokens,
            }
        )
        if error:
            self.failed(error, reason)

    def failed(self, error: object, kind: str) -> None:
        if self._span is not None:
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR, str(error)[:MAX_ERROR_CHARS]))

    def end(self) -> None:
        """Idempotent."""
        span, self._span = self._span, None
        if span is not None:
            span.end()


class Tracing:
    """``provider``: whose spans they are; None: the application's global one."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer: Any = None
        if AVAILABLE:
            self._tracer = trace.get_tracer("sessile", tracer_provider=provider)

    def headers(self) -> Metadata:
        """Those of what is under way in the application now; empty outside of a trace."""
        if self._tracer is None:
            return ()
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return tuple(carrier.items())

    def turn(self, session_id: str, turn_id: str, model: str) -> TurnSpan:
        """Begins a turn's span, a child of the application's current one."""
        if self._tracer is None:
            return TurnSpan()
        says = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "sessile",
            "gen_ai.conversation.id": session_id,
            "sessile.session_id": session_id,
            "sessile.turn_id": turn_id,
        }
        if model:
            says["gen_ai.request.model"] = model
        name = f"chat {model}".rstrip()
        return TurnSpan(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=says))

    def tool(self, session_id: str, name: str, call_id: str) -> AbstractContextManager[object]:
        """A span round the call of a tool, current while it runs; an exception is recorded."""
        if self._tracer is None:
            return nullcontext()
        says = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.conversation.id": session_id,
            "gen_ai.tool.name": name,
            "gen_ai.tool.call.id": call_id,
        }
        context: AbstractContextManager[object] = self._tracer.start_as_current_span(
            f"execute_tool {name}", kind=SpanKind.INTERNAL, attributes=says
        )
        return context
