"""W3C trace context in the metadata of calls: in from callers, out to replicas and peers.

Which headers these are is the process's own choice (``OTEL_PROPAGATORS``; traceparent, tracestate
and baggage unless it is set). A process without a tracer passes its caller's context on.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import context, propagate

Metadata = tuple[tuple[str, str], ...]


def attach_caller(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Makes what the running task starts from here on part of its caller's trace. The task must be
    the call's own (gRPC starts one per call): the context ends with it and needs no detach."""
    context.attach(propagate.extract(dict(metadata or ())))


def headers() -> dict[str, str]:
    """What says that something goes on in the trace of the running task; empty outside of one."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def injected() -> Metadata | None:
    """The same as metadata of a call; None outside of a trace."""
    return tuple(headers().items()) or None
