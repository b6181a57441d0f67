"""Judges every choice of a replica by what the world really is: a session goes where its tokens are
understood (P14) and to nobody who has long been silent (P9), KV is pulled from where it is of use
(P14), and nobody is turned away whom a replica could take that everybody must know to live.

What was chosen from, not what became of it: who loses the race to write it has chosen all the same.
Whether every place of a replica is taken is the choosing gateway's own belief (what it has sent
there and nobody has reported yet is known to it alone), and so is whom a caller excludes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

import gateway.app.assignment
import gateway.app.migration
import gateway.core.migration
from gateway.app.assignment import Assigner, Assignment
from gateway.core import placement
from gateway.core.fleet import FleetSnapshot, Replica
from gateway.core.placement import Decision, NoCandidate, PlacementModel, PlacementRequest
from loadtest.simulation.checkers.fleet_facts import replica_of, same_kv, understands
from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.loop import current_process, true_time
from loadtest.simulation.world import World
from statestore.records import ReplicaRef

Retake = Callable[..., Awaitable[Assignment | None]]
_by_memory: ContextVar[bool] = ContextVar("by_memory", default=False)


@contextmanager
def judged_placements(world: World, witness: Witness) -> Iterator[None]:
    """Every choice is judged meanwhile: for a turn, for one that its owner has no place for, for a
    move and for a drain."""
    judge = Placements(world, witness)
    with ExitStack() as patches:
        for module, name, judged in (
            (gateway.app.assignment, "place", judge.place),
            (gateway.app.assignment, "relieve", judge.relieve),
            (gateway.app.migration, "place", judge.place),
            (gateway.app.migration, "unfit", judge.unfit),
            (gateway.core.migration, "place", judge.place),
            (Assigner, "retake", judge.by_memory(Assigner.retake)),
        ):
            patches.enter_context(mock.patch.object(module, name, judged))
        yield


class Placements:
    """Chooses as the code under test does, and complains to the world."""

    def __init__(self, world: World, witness: Witness) -> None:
        self._world = world
        self._witness = witness

    def place(
        self, fleet: FleetSnapshot, request: PlacementRequest, model: PlacementModel
    ) -> Decision | NoCandidate:
        chosen = placement.place(fleet, request, model)
        self.judge(fleet, request, chosen)
        return chosen

    def relieve(
        self,
        fleet: FleetSnapshot,
        request: PlacementRequest,
        owner: Replica,
        model: PlacementModel,
    ) -> Decision | NoCandidate:
        chosen = placement.relieve(fleet, request, owner, model)
        if isinstance(chosen, Decision):  # it may stay for what is quicker
            self.judge(fleet, request, chosen)
            if chosen.replica.ref == owner.ref:
                self._complain(request, f"P14: is moved from {owner.ref} to where it is")
        return chosen

    def unfit(self, replica: Replica, request: PlacementRequest) -> str | None:
        why = placement.unfit(replica, request)
        if why is None:
            self._judge_target(request, replica.ref)
        elif self._must_fit(replica.ref, request):
            self._complain(request, f"P14: may not go to {replica.ref} ({why}), which can take it")
        return why

    def by_memory(self, retake: Retake) -> Retake:
        """What it chooses by is what a gateway remembers of a session, which need not be so any
        more: where that finds nobody, the session is read and it chooses again."""

        async def judged(*args: Any, **kwargs: Any) -> Assignment | None:
            before = _by_memory.set(True)
            try:
                return await retake(*args, **kwargs)
            finally:
                _by_memory.reset(before)

        return judged

    def judge(
        self, fleet: FleetSnapshot, request: PlacementRequest, chosen: Decision | NoCandidate
    ) -> None:
        """Complains of a choice from a fleet."""
        if isinstance(chosen, Decision):
            self._judge_target(request, chosen.replica.ref)
            source, target = chosen.pull_from, chosen.replica.ref.replica_id
            if source is not None and not same_kv(self._world, source.ref.replica_id, target):
                self._complain(request, f"P14: {target} is to pull KV of another model")
            return
        if _by_memory.get():
            return
        for live in self._world.live_replicas():
            if live.ref is None or not self._must_fit(live.ref, request):
                continue
            known = fleet.get(live.ref)
            if known is None or not known.full(batch=request.batch):
                self._complain(request, f"P14: no place, though {live.ref} has one")

    def _judge_target(self, request: PlacementRequest, target: ReplicaRef) -> None:
        speaks = self._witness.fingerprint(request.session_id)
        if not understands(self._world, target.replica_id, speaks):
            self._complain(request, f"P14: goes to {target}, which has another tokenizer")
        chooser, ref = current_process(), _stored(target)
        replica = replica_of(self._world, ref)
        if chooser is None or replica is None:
            return
        if self._witness.heartbeats.surely_down(chooser, ref, true_time()):
            self._complain(request, f"P9: {chooser.name} chose {target}, which is long dead")

    def _must_fit(self, ref: ReplicaRef, request: PlacementRequest) -> bool:
        """Load aside, nobody may doubt that this replica can take the session."""
        chooser, stored = current_process(), _stored(ref)
        replica = replica_of(self._world, stored)
        if chooser is None or replica is None or ref in request.exclude:
            return False
        info = replica.engine.info
        room = min(info.max_context_tokens, info.capacity_pages * info.page_size)
        return (
            request.history_tokens + request.new_tokens < room
            and understands(
                self._world, ref.replica_id, self._witness.fingerprint(request.session_id)
            )
            and self._witness.surely_fit(stored)
            and self._witness.heartbeats.surely_up(chooser, stored, true_time())
        )

    def _complain(self, request: PlacementRequest, what: str) -> None:
        self._world.violations.append(f"{request.session_id}: {what}")


def _stored(ref: ReplicaRef) -> Ref:
    return ref.replica_id.encode(), b"%d" % ref.incarnation
