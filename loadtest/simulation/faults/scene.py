"""What faults work on: the world and its agents, whom they may hit, and what is told of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio

from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.coverage import Row
from loadtest.simulation.network import Call, Network
from loadtest.simulation.schedule import Fault
from loadtest.simulation.server import StoreWeather
from loadtest.simulation.world import SimGateway, SimReplica, World

RESTART_S = 0.3
"""Until a process that refused to start is started again."""
OPERATOR_S = 8.0
"""How long an operator waits for one call."""


class Scene:
    """Shared by the faults of one history. ``log`` says what was done to whom."""

    def __init__(self, world: World, agents: list[Agent], schedule: Sequence[Fault]) -> None:
        self.log: list[str] = []
        self.world = world
        self.agents = agents
        self.schedule = schedule
        self.losing = world.losing

    @property
    def network(self) -> Network:
        return self.world.network

    @property
    def weather(self) -> StoreWeather:
        return self.world.weather

    # -- whom it hits -------------------------------------------------------------------------

    def replica(self, draw: random.Random) -> SimReplica | None:
        """One that may be harmed: at least one other stays."""
        live = self.world.live_replicas()
        return draw.choice(live) if len(live) > 1 else None

    def gateway(self, draw: random.Random) -> str:
        """Name of any, whether it lives or not."""
        return draw.choice(sorted(self.world.gateways))

    def live(self) -> list[SimReplica | SimGateway]:
        """Every process that runs."""
        return [*self.world.live_replicas(), *self.world.live_gateways()]

    def names(self) -> list[str]:
        """Of every process."""
        return [*sorted(self.world.replicas), *sorted(self.world.gateways)]

    def some_calls(self, draw: random.Random) -> list[Call]:
        """A few of those under way."""
        calls = self.network.streams()
        return draw.sample(calls, min(len(calls), draw.randrange(1, 4)))

    # -- what everyone does -------------------------------------------------------------------

    async def replace(self, victim: SimReplica) -> None:
        """As a supervisor does: again and again, if the new one refuses its store."""
        while self.world.replicas[victim.name] is victim:
            await self.world.start_replica(victim.name)
            victim = self.world.replicas[victim.name]
            if not victim.ended:
                return
            await anyio.sleep(RESTART_S)

    async def pause(self, draw: random.Random, least_s: float, most_s: float) -> None:
        """As long as the fault lasts."""
        await anyio.sleep(draw.uniform(least_s, most_s))

    def saw(self, row: Row) -> None:
        """Counts a row of the failure table."""
        self.world.coverage[row] += 1

    def note(self, what: str) -> None:
        """Tells whoever has to explain a failure."""
        self.log.append(f"{anyio.current_time():8.3f} {what}")
        self.world.timeline.note("", f"fault: {what}")


FaultKind = Callable[[Scene, random.Random], Coroutine[Any, Any, None]]
"""Breaks something and mends it again; everything that is chosen is drawn."""
