"""Replicas that were told to end are emptied before they do: their sessions move with their KV, and
running turns are handed over. Where no other replica could take them they are told not to wait, as
when a whole fleet is stopped. One gateway at a time does it, the one that leads the sweep; were it
two for a moment, each move would still be fenced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing

import anyio

from gateway.app.drain import Drains
from gateway.app.services import Services
from gateway.core.errors import SessileError
from gateway.core.machines import ReplicaState
from gateway.core.migration import has_no_target
from statestore.ports import StoreError
from statestore.records import ReplicaRef

log = logging.getLogger(__name__)


class Leaving:
    """Runs for ever in one task. ``leads`` says whether this gateway is the one."""

    def __init__(self, services: Services, drains: Drains, leads: Callable[[], bool]) -> None:
        self._fleet = services.fleet
        self._clock = services.clock
        self._times = services.config.times
        self._drains = drains
        self._leads = leads
        self._watched: set[ReplicaRef] = set()
        """At most as many as the fleet has replicas."""

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                # No await from the look at the fleet to the wait for its next change.
                for replica in self._fleet.snapshot.replicas:
                    if self._asks(replica.ref) and replica.ref not in self._watched:
                        self._watched.add(replica.ref)
                        tasks.start_soon(self._empty, replica.ref, name="leaving replica")
                await self._fleet.changed()

    def _asks(self, ref: ReplicaRef) -> bool:
        replica = self._fleet.snapshot.named(ref.replica_id)
        return (
            replica is not None
            and replica.ref == ref
            and replica.load.leaving
            and replica.state is ReplicaState.DRAINING
        )

    async def _empty(self, ref: ReplicaRef) -> None:
        """Until the replica is gone. It ends by itself, empty or not."""
        try:
            while self._asks(ref):
                if self._leads():
                    if not self._has_no_target(ref):
                        await self._drain(ref)
                    if self._has_no_target(ref):
                        await self._give_up(ref)
                await self._clock.sleep(self._times.waiting_event_s)
        finally:
            self._watched.discard(ref)

    async def _drain(self, ref: ReplicaRef) -> None:
        try:
            steps = self._drains.drain(ref.replica_id, self._times.default_drain_s, shutdown=True)
            async with aclosing(steps):
                async for step in steps:
                    if step.done or not self._asks(ref) or self._has_no_target(ref):
                        return
        except (SessileError, StoreError) as error:
            log.warning("%s, which is about to end, could not be emptied: %s", ref, error)

    def _has_no_target(self, ref: ReplicaRef) -> bool:
        """As far as is known, which it is not while the store does not answer."""
        fleet = self._fleet.snapshot
        replica = fleet.get(ref)
        return replica is not None and self._fleet.store_answers and has_no_target(replica, fleet)

    async def _give_up(self, ref: ReplicaRef) -> None:
        try:
            await self._drains.give_up(ref.replica_id)
        except (SessileError, StoreError) as error:
            log.warning("%s could not be told to end without waiting: %s", ref, error)
