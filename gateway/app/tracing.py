"""Spans of the gateway's orchestration; no-ops unless the process installs an SDK."""

from __future__ import annotations

from opentelemetry import trace

tracer = trace.get_tracer("sessile.gateway")
