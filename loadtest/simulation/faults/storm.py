"""Carries out a schedule of faults, and ends them all."""

from __future__ import annotations

import random
from collections.abc import Sequence

import anyio
from anyio.abc import TaskGroup

from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.faults import clients, connections, losses, operators, processes
from loadtest.simulation.faults.scene import FaultKind, Scene
from loadtest.simulation.schedule import Fault
from loadtest.simulation.world import SimGateway, SimReplica, World

FAULTS: dict[str, FaultKind] = {
    kind.__name__: kind
    for kind in (
        *processes.KINDS,
        *connections.KINDS,
        *operators.KINDS,
        *clients.KINDS,
        *losses.KINDS,
    )
}


class Storm:
    """Breaks the world by a schedule."""

    def __init__(self, world: World, agents: list[Agent], schedule: Sequence[Fault]) -> None:
        self.schedule = schedule
        self._scene = Scene(world, agents, schedule)

    @property
    def log(self) -> list[str]:
        """What was done to whom."""
        return self._scene.log

    async def blow(self, tasks: TaskGroup) -> None:
        """Starts each fault at its time; each runs in ``tasks`` until it is mended."""
        began = anyio.current_time()
        for fault in self.schedule:
            await anyio.sleep(max(0.0, began + fault.at_s - anyio.current_time()))
            self._scene.note(fault.kind)
            tasks.start_soon(FAULTS[fault.kind], self._scene, random.Random(fault.seed))

    async def mend(self) -> None:
        """Ends everything that is still broken, and restarts what is down."""
        self._scene.note("mend")
        world = self._scene.world
        world.weather.clear_up()
        world.network.heal()
        nodes: list[SimReplica | SimGateway] = [*world.replicas.values(), *world.gateways.values()]
        for node in nodes:
            node.process.set_clock(1.0)
        for name, replica in sorted(world.replicas.items()):
            if replica.process.stopped and not replica.ended:
                replica.process.resume()
            if replica.ended:
                await world.start_replica(name)
        for name, gateway in sorted(world.gateways.items()):
            if gateway.ended:
                world.start_gateway(name)
        for replica in world.live_replicas():
            replica.engine.slow_down(1.0)
            await operators.undrain(self._scene, replica)
