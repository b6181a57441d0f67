"""Processes that die, stop, compute slowly, lose their cache or have a clock of their own."""

from __future__ import annotations

import random

import anyio

from loadtest.simulation.faults.scene import RESTART_S, Scene


async def kill_replica(scene: Scene, draw: random.Random) -> None:
    """A process dies, and a new one takes its name."""
    victim = scene.replica(draw)
    if victim is not None:
        scene.note(f"kill {victim.name}")
        scene.world.kill(victim)
        await scene.pause(draw, 0.1, draw.choice((1.0, 3.0, 6.0)))
        await scene.replace(victim)


async def stop_replica(scene: Scene, draw: random.Random) -> None:
    """A process is asked to end (SIGTERM), and a new one takes its name."""
    victim = scene.replica(draw)
    if victim is not None:
        scene.note(f"stop {victim.name}")
        victim.process.run(victim.stop.set)
        await scene.pause(draw, 0.5, 3.0)
        if not victim.ended:
            scene.world.kill(victim)
        await scene.replace(victim)


async def freeze_replica(scene: Scene, draw: random.Random) -> None:
    """A process stops and goes on later, perhaps after it has been replaced."""
    victim = scene.replica(draw)
    if victim is None:
        return
    scene.note(f"freeze {victim.name}")
    victim.process.stop()
    replaced = draw.random() < 0.3
    await scene.pause(draw, 0.2, 3.0)
    if replaced and scene.world.replicas[victim.name] is victim:
        await scene.world.start_replica(victim.name)
        await scene.pause(draw, 0.2, 3.0)
    if not victim.ended:
        scene.note(f"thaw {victim.name}")
        victim.process.resume()


async def kill_gateway(scene: Scene, draw: random.Random) -> None:
    """A gateway dies and is restarted; the other one stays."""
    live = scene.world.live_gateways()
    if len(live) > 1:
        victim = draw.choice(live)
        scene.world.kill(victim)
        await scene.pause(draw, 0.05, 1.0)
        while scene.world.gateways[victim.name] is victim:
            scene.world.start_gateway(victim.name)
            victim = scene.world.gateways[victim.name]
            await anyio.sleep(RESTART_S)
            # Without the store's answer it ends again, after as long as it waits for that.
            while not (victim.ended or victim.serves):  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(RESTART_S)
            if not victim.ended:
                return


async def skew_clocks(scene: Scene, draw: random.Random) -> None:
    """Processes' clocks go slower and faster than others'."""
    nodes = scene.live()
    skewed = draw.sample(nodes, draw.randrange(1, len(nodes) + 1)) if nodes else []
    for node in skewed:
        node.process.set_clock(draw.choice((0.3, 0.8, 1.25, 3.0)))
    await scene.pause(draw, 1.0, 4.0)
    for node in skewed:
        if not node.ended:
            node.process.set_clock(1.0)


async def jump_clock(scene: Scene, draw: random.Random) -> None:
    """A process's clock jumps forward, as after its machine was suspended."""
    nodes = scene.live()
    if nodes:
        node, jump_s = draw.choice(nodes), draw.choice((0.5, 3.0, 30.0, 600.0))
        scene.note(f"the clock of {node.name} jumps by {jump_s} s")
        node.process.set_clock(node.process.rate, jump_s)


async def slow_engine(scene: Scene, draw: random.Random) -> None:
    """A replica computes as slowly as on an overloaded machine."""
    victim = scene.replica(draw)
    if victim is not None:
        scene.note(f"{victim.name} computes slowly")
        victim.engine.slow_down(20.0)
        await scene.pause(draw, 0.5, 3.0)
        victim.engine.slow_down(1.0)


async def evict(scene: Scene, draw: random.Random) -> None:
    """A replica's cached KV is gone, under whoever counts on it."""
    victim = scene.replica(draw)
    if victim is not None:
        scene.note(f"{victim.name} evicts {victim.engine.evict_all()} pages")


KINDS = (
    kill_replica,
    stop_replica,
    freeze_replica,
    kill_gateway,
    skew_clocks,
    jump_clock,
    slow_engine,
    evict,
)
