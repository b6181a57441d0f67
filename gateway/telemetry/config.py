"""Settings of traces, metrics and logs, the same for gateways and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LogFormat = Literal["auto", "text", "json"]
"""``auto``: text on a terminal, JSON elsewhere."""
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """Nothing is exported, and no SDK is set up, unless an endpoint or a listener is given here or
    by the standard environment (``OTEL_EXPORTER_OTLP_ENDPOINT`` …). What is set here goes before
    the environment. Contradictory settings raise ValueError."""

    otlp_endpoint: str = ""
    """http://host:port or https://… of an OTLP receiver over gRPC; empty: the environment's."""
    traces: bool = True
    """Export spans to that endpoint."""
    sample_ratio: float | None = None
    """Share of sessions that are traced, 0 to 1. A caller's own decision goes before it. None:
    ``OTEL_TRACES_SAMPLER``, or all."""
    metrics: bool = True
    """Export metrics to that endpoint."""
    metrics_interval_s: float = 15.0
    prometheus_listen: str = ""
    """host:port on which ``/metrics`` is served, with TLS if the process has a certificate; port 0
    takes a free one. Empty: nowhere."""
    tenant_labels: bool = False
    """Metrics of turns and tokens by tenant. Over 100 tenants the others are counted as one."""
    log_level: str = "INFO"
    """Of what is logged at least: DEBUG, INFO, WARNING, ERROR or CRITICAL, in either case."""
    log_format: LogFormat = "auto"
    """auto: text on a terminal, else JSON."""

    def __post_init__(self) -> None:
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_endpoint begins with http:// or https://, as in http://127.0.0.1:4317; it "
                f"is {self.otlp_endpoint!r}"
            )
        if self.sample_ratio is not None and not 0 <= self.sample_ratio <= 1:
            raise ValueError(f"sample_ratio is from 0 to 1, not {self.sample_ratio}")
        if not self.metrics_interval_s > 0:
            raise ValueError(f"metrics_interval_s must be positive, not {self.metrics_interval_s}")
        if self.prometheus_listen:
            host, _, port = self.prometheus_listen.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65_535:
                raise ValueError(f"prometheus_listen is host:port, not {self.prometheus_listen!r}")
        if self.log_level.upper() not in LOG_LEVELS:
            levels = ", ".join(LOG_LEVELS)
            raise ValueError(f"log_level is one of {levels}, not {self.log_level!r}")
        if self.log_format not in ("auto", "text", "json"):
            raise ValueError(f"log_format is auto, text or json, not {self.log_format!r}")
