"""The OpenTelemetry SDK of a process: set up from its settings, flushed at its end.

The SDK is imported only if something is to be exported. An SDK that was installed before (by
``opentelemetry-instrument`` for instance) is used as it is if nothing is configured here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from threading import Thread
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace

from gateway.telemetry.config import TelemetryConfig
from gateway.telemetry.instruments import INSTRUMENTS
from gateway.telemetry.tracing import Tracing, forced_ids

if TYPE_CHECKING:
    from ssl import SSLContext

    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 3.0
"""What is not exported this long after the end is lost: a collector that is away must not hold up
a restart."""

NEEDED = "needs the packages of the extra: pip install 'sessile-server[telemetry]'"


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a process records with. The default records nothing by itself."""

    tracer_provider: trace.TracerProvider | None = None
    meter_provider: metrics.MeterProvider | None = None
    prometheus_address: str = ""
    """host:port on which ``/metrics`` is served."""
    tenant_labels: bool = False

    def tracing(self, scope: str) -> Tracing:
        return Tracing(scope, self.tracer_provider)

    def meter(self, scope: str) -> metrics.Meter | None:
        """None if nobody would get what it records."""
        provider = self.meter_provider or metrics.get_meter_provider()
        if type(provider).__module__.startswith("opentelemetry.metrics"):
            return None  # the API's own, which does nothing
        return metrics.get_meter(scope, meter_provider=provider)


OFF = Telemetry()


@contextmanager
def installed(
    config: TelemetryConfig,
    service: str,
    instance: str,
    attributes: Mapping[str, str],
    *,
    tls: Callable[[], SSLContext] | None = None,
    for_libraries: bool = True,
) -> Iterator[Telemetry]:
    """Exports as configured until the block is left, then flushes for FLUSH_TIMEOUT_S at most.

    ``service`` is the service's name if ``OTEL_SERVICE_NAME`` gives no other, ``instance`` names
    this process. ``tls`` gives what a new connection to the Prometheus listener speaks; None: no
    TLS. ``for_libraries``: what is installed is the process's global one too, for code
    that knows no other. Raises ValueError for settings that cannot be followed, OSError if the
    address of the Prometheus listener cannot be bound, ImportError without the packages that are
    needed."""
    endpoints = {signal: _endpoint(config, signal) for signal in ("traces", "metrics")}
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or not (any(endpoints.values()) or config.prometheus_listen):
        yield Telemetry(tenant_labels=config.tenant_labels)
        return
    try:
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        raise ImportError(f"telemetry {NEEDED}") from error
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or service,
            "service.instance.id": instance,
            "service.version": _version(),
            **attributes,
        }
    )
    tracers: trace.TracerProvider | None = None
    meters: metrics.MeterProvider | None = None
    address = ""
    with ExitStack() as stack:
        if endpoints["traces"]:
            tracers = stack.enter_context(_traces(config, endpoints["traces"], resource))
            if for_libraries:
                trace.set_tracer_provider(tracers)
        readers: list[MetricReader] = []
        if config.prometheus_listen:
            reader, address = stack.enter_context(_prometheus(config.prometheus_listen, tls))
            readers.append(reader)
        if endpoints["metrics"]:
            readers.append(_otlp_metrics(config, endpoints["metrics"]))
        if readers:
            meters = stack.enter_context(_metrics(readers, resource))
            if for_libraries:
                metrics.set_meter_provider(meters)
        yield Telemetry(tracers, meters, address, config.tenant_labels)


def _endpoint(config: TelemetryConfig, signal: str) -> str:
    """Where a signal goes; empty: nowhere."""
    upper = signal.upper()
    exporter = os.environ.get(f"OTEL_{upper}_EXPORTER", "otlp").strip().lower()
    if exporter not in ("otlp", "none"):
        raise ValueError(f"OTEL_{upper}_EXPORTER is otlp or none here, not {exporter!r}")
    wanted = config.traces if signal == "traces" else config.metrics
    if not wanted or exporter == "none":
        return ""
    endpoint = (
        config.otlp_endpoint
        or os.environ.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT", "")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    )
    protocol = (
        os.environ.get(f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "grpc"
    )
    if endpoint and protocol != "grpc":
        raise ValueError(
            f"OTLP is spoken over gRPC only, not {protocol!r}: unset OTEL_EXPORTER_OTLP_PROTOCOL "
            "and give the receiver's gRPC port (4317 by default)"
        )
    return endpoint


@contextmanager
def _traces(
    config: TelemetryConfig, endpoint: str, resource: Resource
) -> Iterator[trace.TracerProvider]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ImportError(f"exporting traces {NEEDED}") from error

    class Ids(RandomIdGenerator):
        """Random ids, but for the roots of sessions."""

        forces_ids = True

        def generate_span_id(self) -> int:
            forced = forced_ids.get()
            return super().generate_span_id() if forced is None else forced.span_id

        def generate_trace_id(self) -> int:
            forced = forced_ids.get()
            return super().generate_trace_id() if forced is None else forced.trace_id

    ratio = config.sample_ratio
    provider = TracerProvider(
        sampler=None if ratio is None else ParentBasedTraceIdRatio(ratio),
        resource=resource,
        id_generator=Ids(),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    log.info("spans are exported to %s", endpoint)
    try:
        yield provider
    finally:
        _flush(provider.shutdown)


def _otlp_metrics(config: TelemetryConfig, endpoint: str) -> MetricReader:
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    try:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    except ImportError as error:
        raise ImportError(f"exporting metrics {NEEDED}") from error
    log.info("metrics are exported to %s", endpoint)
    return PeriodicExportingMetricReader(
        OTLPMetricExporter(endpoint=endpoint),
        export_interval_millis=config.metrics_interval_s * 1000,
        export_timeout_millis=FLUSH_TIMEOUT_S * 1000,
    )


@contextmanager
def _prometheus(
    listen: str, tls: Callable[[], SSLContext] | None
) -> Iterator[tuple[MetricReader, str]]:
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import CollectorRegistry

        from gateway.telemetry.scraping import serving
    except ImportError as error:
        raise ImportError(f"the Prometheus listener {NEEDED}") from error
    registry = CollectorRegistry()
    reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
    host, _, port = listen.rpartition(":")
    with ExitStack() as stack:
        try:
            bound = stack.enter_context(serving(host.strip("[]"), int(port), registry, tls))
        except OSError as error:
            raise OSError(f"cannot listen for Prometheus on {listen}: {error}") from error
        address = f"{host}:{bound}"
        scheme = "http" if tls is None else "https"
        log.info("metrics are served on %s://%s/metrics", scheme, address)
        yield reader, address


@contextmanager
def _metrics(readers: list[MetricReader], resource: Resource) -> Iterator[metrics.MeterProvider]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View

    views = [
        View(
            instrument_name=one.name,
            aggregation=ExplicitBucketHistogramAggregation(one.buckets),
        )
        for one in INSTRUMENTS.values()
        if one.buckets
    ]
    provider = MeterProvider(readers, resource, views=views, shutdown_on_exit=False)
    try:
        yield provider
    finally:
        _flush(provider.shutdown)


def _flush(shutdown: Callable[[], None]) -> None:
    """Exports what is left. The exporters' own time limits are longer than ours."""
    thread = Thread(target=shutdown, name="telemetry flush", daemon=True)
    thread.start()
    thread.join(FLUSH_TIMEOUT_S)
    if thread.is_alive():
        log.warning("not all telemetry was exported within %s s of the end", FLUSH_TIMEOUT_S)


def _version() -> str:
    try:
        return version("sessile-server")
    except PackageNotFoundError:
        return "unknown"
