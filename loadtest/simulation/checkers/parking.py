"""Samples which turns wait though they need not (P6).

A turn is parked while too much of what it said is not acknowledged by the store. As soon as all of
it is, it goes on; and it never waits for what another turn is to get acknowledged.
"""

from __future__ import annotations

from loadtest.simulation.world import World


class Parking:
    """:meth:`sample` is called now and then; what is seen twice in a row is a violation."""

    def __init__(self, world: World) -> None:
        self.violations: list[str] = []
        self._world = world
        self._parked: set[tuple[str, str]] = set()
        self._told: set[tuple[str, str]] = set()

    def sample(self) -> None:
        seen = {
            (replica.name, generation_id)
            for replica in self._world.live_replicas()
            if replica.app is not None
            for run in [*replica.app._runs._runs.values()]
            if run.opened is not None and run.released == len(run.output.tokens)
            if (generation_id := run._generation._id if run._generation else "")
            if (generation := replica.engine._scheduler._by_id.get(generation_id)) is not None
            if generation.parked
        }
        for name, generation_id in sorted((seen & self._parked) - self._told):
            self._told.add((name, generation_id))
            self.violations.append(
                f"{name}: P6: {generation_id} is parked though all it said is acknowledged"
            )
        self._parked = seen
