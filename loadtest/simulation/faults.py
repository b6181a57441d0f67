"""Faults, drawn from a seed. Each kind breaks something and mends it again after a while."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from anyio.abc import TaskGroup

from gateway.app.migration import MoveOptions
from gateway.core.errors import NotFound, SessileError
from loadtest.simulation.agents import Agent
from loadtest.simulation.network import Call
from loadtest.simulation.world import SimReplica, World

DRAIN_S = 4.0
MAX_LOSS_S = 0.4
"""Acknowledged writes that a fail-over of the store may lose were made within this time."""


class Storm:
    """Draws which kinds of faults there are (most histories have only some: rare combinations are
    reached by leaving others out), and when."""

    def __init__(
        self, world: World, agents: list[Agent], draw: random.Random, kinds: list[str] | None = None
    ) -> None:
        self.log: list[str] = []
        self._world = world
        self._agents = agents
        self._draw = draw
        harmless = sorted(set(FAULTS) - LOSSY)
        self.kinds = kinds or draw.sample(harmless, draw.randrange(1, len(harmless) + 1))

    async def blow(self, tasks: TaskGroup, duration_s: float) -> None:
        """Starts faults for so long; each runs in ``tasks`` until it is mended."""
        until = anyio.current_time() + duration_s
        while True:
            await anyio.sleep(self._draw.expovariate(1.2))
            if anyio.current_time() >= until:
                return
            kind = self._draw.choice(self.kinds)
            self._note(kind)
            tasks.start_soon(FAULTS[kind], self)

    async def mend(self) -> None:
        """Ends everything that is still broken, and restarts what is down."""
        self._note("mend")
        world = self._world
        world.weather.down = False
        world.weather.request_lost = world.weather.reply_lost = 0.0
        world.network.corrupt_page_rate = 0.0
        world.network.heal()
        for name, replica in sorted(world.replicas.items()):
            if replica.process.stopped and not replica.ended:
                replica.process.resume()
            if replica.ended:
                await world.start_replica(name)
        for name, gateway in sorted(world.gateways.items()):
            if gateway.ended:
                world.start_gateway(name)

    # -- kinds --------------------------------------------------------------------------------

    async def kill_replica(self) -> None:
        """A process dies, and a new one takes its name."""
        victim = self._replica()
        if victim is not None:
            self._note(f"kill {victim.name}")
            self._world.kill(victim)
            await self._pause(0.1, 3.0)
            await self._replace(victim)

    async def freeze_replica(self) -> None:
        """A process stops and goes on later, perhaps after it has been replaced."""
        victim = self._replica()
        if victim is None:
            return
        self._note(f"freeze {victim.name}")
        victim.process.stop()
        replaced = self._draw.random() < 0.3
        await self._pause(0.2, 3.0)
        if replaced and self._world.replicas[victim.name] is victim:
            await self._world.start_replica(victim.name)
            await self._pause(0.2, 3.0)
        if not victim.ended:
            self._note(f"thaw {victim.name}")
            victim.process.resume()

    async def kill_gateway(self) -> None:
        """A gateway dies and is restarted; the other one stays."""
        live = self._world.live_gateways()
        if len(live) > 1:
            victim = self._draw.choice(live)
            self._world.kill(victim)
            await self._pause(0.05, 1.0)
            if self._world.gateways[victim.name] is victim:
                self._world.start_gateway(victim.name)

    async def flaky_store(self) -> None:
        """Requests and replies get lost."""
        weather = self._world.weather
        weather.request_lost, weather.reply_lost = self._draw.uniform(0, 0.2), 0.2
        await self._pause(0.2, 2.0)
        weather.request_lost = weather.reply_lost = 0.0

    async def store_outage(self) -> None:
        """Nobody gets an answer."""
        self._world.weather.down = True
        await self._pause(0.1, 3.0)
        self._world.weather.down = False

    async def cut(self) -> None:
        """Two processes do not hear each other, while both hear everybody else."""
        replicas = sorted(self._world.replicas)
        one = self._draw.choice(replicas)
        other = self._draw.choice(
            [n for n in [*replicas, *sorted(self._world.gateways)] if n != one]
        )
        self._note(f"cut {one} {other}")
        self._world.network.cut(one, other)
        await self._pause(0.2, 4.0)
        self._world.network.heal()

    async def drain(self) -> None:
        """An operator empties a replica, which then ends and is started again."""
        victim = self._replica()
        if victim is None:
            return
        self._note(f"drain {victim.name}")

        async def handler(app: Any, call: Call) -> None:
            async for progress in app.drains.drain(victim.name, DRAIN_S, True):
                await call.put(progress)

        try:
            async for _ in self._world.network.stream(self._gateway(), handler, 2 * DRAIN_S):
                pass
        except SessileError as error:
            self._note(f"drain {victim.name}: {error}")
        await self._pause(0.2, 0.5)
        if not victim.ended and self._world.replicas[victim.name] is victim:
            self._world.kill(victim)  # what it still has is taken over
        await self._replace(victim)

    async def migrate(self) -> None:
        """An operator moves a session."""
        agents = [agent for agent in self._agents if agent.session_id and not agent.closed]
        if not agents:
            return
        agent = self._draw.choice(agents)
        target = self._draw.choice(sorted(self._world.replicas))

        async def move(app: Any) -> Any:
            session = await app.store.get_session(agent.session_id)
            if session is None:
                raise NotFound("it was purged")
            return await app.migrations.migrate(session, MoveOptions(target, 3.0))

        try:
            result = await self._world.network.unary(self._gateway(), move, 8.0)
            self._note(f"migrate {agent.session_id} to {target}: {result.moved} {result.detail}")
        except SessileError as error:
            self._note(f"migrate {agent.session_id} to {target}: {error}")

    async def corrupt_pages(self) -> None:
        """KV arrives with wrong bytes."""
        self._world.network.corrupt_page_rate = 0.2
        await self._pause(0.5, 3.0)
        self._world.network.corrupt_page_rate = 0.0

    async def lose_writes(self) -> None:
        """The store fails over and forgets what it has just acknowledged."""
        now = anyio.current_time()
        if any(not a.session_id or now - a.opened_at < 2 * MAX_LOSS_S for a in self._agents):
            return  # clients would have to open their sessions again
        before = self._world.server.snapshot()
        await self._pause(0.02, MAX_LOSS_S)
        self._note("writes are lost")
        self._world.server.restore(before)

    # -- inside -------------------------------------------------------------------------------

    def _replica(self) -> SimReplica | None:
        """One that may be harmed: at least one other stays."""
        live = self._world.live_replicas()
        return self._draw.choice(live) if len(live) > 1 else None

    async def _replace(self, victim: SimReplica) -> None:
        if self._world.replicas[victim.name] is victim:
            await self._world.start_replica(victim.name)

    def _gateway(self) -> str:
        return self._draw.choice(sorted(self._world.gateways))

    async def _pause(self, least_s: float, most_s: float) -> None:
        await anyio.sleep(self._draw.uniform(least_s, most_s))

    def _note(self, what: str) -> None:
        self.log.append(f"{anyio.current_time():8.3f} {what}")


FAULTS: dict[str, Callable[[Storm], Coroutine[Any, Any, None]]] = {
    "kill_replica": Storm.kill_replica,
    "freeze_replica": Storm.freeze_replica,
    "kill_gateway": Storm.kill_gateway,
    "flaky_store": Storm.flaky_store,
    "store_outage": Storm.store_outage,
    "cut": Storm.cut,
    "drain": Storm.drain,
    "migrate": Storm.migrate,
    "corrupt_pages": Storm.corrupt_pages,
    "lose_writes": Storm.lose_writes,
}
LOSSY = frozenset({"lose_writes"})
"""Only where they are asked for: clients may then be told of a loss."""
