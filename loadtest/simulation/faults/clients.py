"""Clients that are too many, that cancel at a bad moment, or whose turn kills whoever runs it."""

from __future__ import annotations

import asyncio
import random

import anyio

from loadtest.simulation.clients.agents import TENANTS, Agent
from loadtest.simulation.clients.lifecycle import run_once
from loadtest.simulation.faults.losses import LOSSY
from loadtest.simulation.faults.scene import RESTART_S, Scene
from loadtest.simulation.loop import current_process, outside
from loadtest.simulation.world import SimReplica

BURST = 8
"""Sessions that are opened at once."""
MAX_KILLED = 2
"""Replicas that one turn may kill in a row before it is given up, as scripts are told."""


async def burst(scene: Scene, draw: random.Random) -> None:
    """Many sessions are opened and run a turn at once, every other one a batch turn."""
    async with anyio.create_task_group() as tasks:
        for index in range(draw.randrange(2, BURST + 1)):
            name = f"b{draw.getrandbits(24)}.{index}"
            own = random.Random(draw.random())
            tenant, batch = draw.choice(TENANTS), index % 2 == 1
            agent = Agent(scene.world, name, own, tenant=tenant, brief=True, batch=batch)
            scene.agents.append(agent)
            tasks.start_soon(run_once, agent, name=name)


async def cancel_at_switch(scene: Scene, draw: random.Random) -> None:
    """Turns are cancelled just when they are handed over."""
    scene.weather.cancel_at_switch = True
    await scene.pause(draw, 0.5, 3.0)
    scene.weather.cancel_at_switch = False


async def poison(scene: Scene, draw: random.Random) -> None:
    """A turn that kills every process that runs it, before it says anything (P10)."""
    agent = Agent(scene.world, f"p{draw.getrandbits(24)}", random.Random(draw.random()), brief=True)
    agent.poison = True
    scene.agents.append(agent)
    await agent.open()
    killed: list[SimReplica] = []

    def kill(session_id: str) -> None:
        victim = scene.world.serving.get(process) if (process := current_process()) else None
        if session_id == agent.session_id and victim is not None and not victim.ended:
            killed.append(victim)
            outside(asyncio.get_running_loop().call_soon, scene.world.kill, victim)

    scene.world.server.on_turn.append(kill)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_revive, scene, killed)
        await agent.turn()
        tasks.cancel_scope.cancel()
    scene.world.server.on_turn.remove(kill)
    for victim in killed:
        await scene.replace(victim)
    counted = LOSSY.isdisjoint(fault.kind for fault in scene.schedule)
    few = len(killed) <= MAX_KILLED or not counted  # what was lost may have been the count
    agent.expect(few, f"P10: one turn killed {len(killed)} replicas, in a row")


async def _revive(scene: Scene, killed: list[SimReplica]) -> None:
    """Starts again what a turn has killed, for as long as it does."""
    revived = 0
    while True:
        await anyio.sleep(RESTART_S)
        for victim in killed[revived:]:
            revived += 1
            scene.note(f"{victim.name} was killed by a turn")
            await scene.replace(victim)


KINDS = (
    burst,
    cancel_at_switch,
    poison,
)
