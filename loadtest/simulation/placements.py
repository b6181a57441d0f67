"""Judges placements by the fleet they were chosen from (P14): a session finds a place wherever its
tokens are understood, whatever KV is there, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from gateway.app import assignment
from gateway.core import placement
from gateway.core.fleet import FleetSnapshot, Replica
from gateway.core.machines import ReplicaState
from gateway.core.placement import Decision, NoCandidate, PlacementModel, PlacementRequest


@contextmanager
def judged_placements(complain: Callable[[str], None]) -> Iterator[None]:
    """Every placement for a turn is judged meanwhile."""

    def judged(
        fleet: FleetSnapshot, request: PlacementRequest, model: PlacementModel
    ) -> Decision | NoCandidate:
        chosen = placement.place(fleet, request, model)
        if isinstance(chosen, Decision):
            if not _understands(chosen.replica, request):
                complain(f"{request.session_id}: P14: goes to {chosen.replica.ref}, in its tokens")
        else:
            for replica in fleet.replicas:
                if _fits(replica, request):
                    complain(f"{request.session_id}: P14: no place, though {replica.ref} has one")
        return chosen

    with mock.patch.object(assignment, "place", judged):
        yield


def _understands(replica: Replica, request: PlacementRequest) -> bool:
    return request.token_fingerprint in ("", replica.details.token_fingerprint)


def _fits(replica: Replica, request: PlacementRequest) -> bool:
    details = replica.details
    context = request.history_tokens + request.new_tokens
    room = min(details.max_context_tokens, details.capacity_pages * details.page_size)
    return (
        replica.state is ReplicaState.READY
        and not replica.full
        and details.model == request.model
        and replica.ref not in request.exclude
        and context < room
        and _understands(replica, request)
    )
