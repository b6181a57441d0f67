"""Names under which instruments arrive in Prometheus."""

from __future__ import annotations

from gateway.telemetry.instruments import Instrument

SUFFIX = {"s": "_seconds", "By": "_bytes"}


def exported_names(instrument: Instrument) -> set[str]:
    """Of its samples, as OpenTelemetry's exporter translates them."""
    base = instrument.name.replace(".", "_") + SUFFIX.get(instrument.unit, "")
    match instrument.kind:
        case "counter":
            return {f"{base}_total"}
        case "histogram":
            return {f"{base}_bucket", f"{base}_count", f"{base}_sum"}
        case "gauge":
            return {base}
