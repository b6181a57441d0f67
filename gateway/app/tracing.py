"""What the gateway's spans say: of placements and of calls about a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from gateway.app.services import Services
from gateway.core.placement import Decision, NoCandidate
from gateway.telemetry import attributes as a
from gateway.telemetry.logs import about
from gateway.telemetry.tracing import Attributes, Value

Answer = TypeVar("Answer")

MAX_CANDIDATES = 32
"""Replicas named on one span, the best ones."""


def placement_attributes(decision: Decision | NoCandidate) -> Attributes:
    """Candidates, best first, with the parts of their cost in ms, and who was none and why. Lists
    of equal length belong together."""
    excluded = [f"{one.ref}: {one.why}" for one in decision.excluded[:MAX_CANDIDATES]]
    found: dict[str, Value] = {"sessile.placement.excluded": excluded}
    if isinstance(decision, NoCandidate):
        return found
    costs = decision.costs[:MAX_CANDIDATES]
    found |= {
        a.REPLICA: str(decision.replica.ref),
        "sessile.placement.candidates": [str(cost.ref) for cost in costs],
        "sessile.placement.cost_ms": [round(cost.total_ms, 3) for cost in costs],
        "sessile.placement.prefill_ms": [round(cost.prefill_ms, 3) for cost in costs],
        "sessile.placement.transfer_ms": [round(cost.transfer_ms, 3) for cost in costs],
        "sessile.placement.queue_ms": [round(cost.queue_ms, 3) for cost in costs],
        "sessile.placement.pressure_ms": [round(cost.pressure_ms, 3) for cost in costs],
        "sessile.placement.cached_tokens": [float(cost.cached_tokens) for cost in costs],
    }
    if decision.pull_from is not None:
        found["sessile.placement.pull_from"] = str(decision.pull_from.ref)
    return found


def traced(
    services: Services, name: str, call: Callable[[str, Any], Awaitable[Answer]]
) -> Callable[[str, Any], Awaitable[Answer]]:
    """A call (tenant, request) about a session as a span of the session's life. The tenant has to
    be the session's: others leave nothing in its trace."""

    async def with_span(tenant: str, request: Any) -> Answer:
        session_id = request.session_id
        await services.directory.find(tenant, session_id)
        with about(session_id), services.tracing.session_span(name, session_id):
            return await call(tenant, request)

    return with_span if services.tracing.on else call
