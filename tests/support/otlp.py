"""A receiver of OTLP over gRPC that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 30.0


@dataclass(frozen=True)
class ReceivedSpan:
    """Ids are in hex."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    events: tuple[str, ...]
    began_ns: int
    ended_ns: int
    failed: bool
    service: str
    instance: str
    kind: int

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


class Receiver:
    """What has come so far. Its lists grow while processes export."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.metrics: set[str] = set()
        self.endpoint = ""
        self._lock = threading.Lock()

    def of(self, name: str, **attributes: object) -> list[ReceivedSpan]:
        """Spans of this name and these attributes (``_`` for ``.``, without ``sessile.``)."""
        wanted = {f"sessile.{key}": value for key, value in attributes.items()}
        with self._lock:
            return [
                span
                for span in self.spans
                if span.name == name and wanted.items() <= span.attributes.items()
            ]

    def in_trace(self, trace_id: str) -> list[ReceivedSpan]:
        with self._lock:
            return [span for span in self.spans if span.trace_id == trace_id]

    def of_session(self, session_id: str) -> list[ReceivedSpan]:
        """What a search for the session's id finds."""
        with self._lock:
            return [s for s in self.spans if s.attributes.get("sessile.session_id") == session_id]

    async def until(self, found: Callable[[], object]) -> None:
        """Waits for what exporters send in batches; TimeoutError says what has come."""
        try:
            with anyio.fail_after(WAIT_S):
                while not found():  # noqa: ASYNC110 - they come in threads of gRPC
                    await anyio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(sorted(f"{s.service} {s.name}" for s in self.spans)) from None

    def take_spans(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            says = _plain(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    received = _received(span, says)
                    with self._lock:
                        self.spans.append(received)

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                with self._lock:
                    self.metrics.update(metric.name for metric in scope.metrics)


@contextmanager
def receiver() -> Iterator[Receiver]:
    """A running one on a free port; ``endpoint`` is its URL."""
    kept = Receiver()

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: object) -> Any:
            kept.take_spans(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: object) -> Any:
            kept.take_metrics(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(Traces(), server)
    add = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
    add(Metrics(), server)
    kept.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield kept
    finally:
        server.stop(None).wait()


def _received(span: trace_pb2.Span, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_plain(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        events=tuple(event.name for event in span.events),
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        service=resource.get("service.name", ""),
        instance=resource.get("service.instance.id", ""),
        kind=span.kind,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None
