"""Connections that break or carry something else: between processes, of KV, and to the store."""

from __future__ import annotations

import random

from loadtest.simulation.faults.scene import Scene
from loadtest.simulation.network import STORE


async def cut(scene: Scene, draw: random.Random) -> None:
    """Two processes do not hear each other, while both hear everybody else."""
    replicas = sorted(scene.world.replicas)
    one = draw.choice(replicas)
    other = draw.choice([n for n in [*replicas, *sorted(scene.world.gateways)] if n != one])
    scene.note(f"cut {one} {other}")
    scene.network.cut(one, other)
    await scene.pause(draw, 0.2, 4.0)
    scene.network.join(one, other)
    scene.network.join(other, one)


async def cut_one_way(scene: Scene, draw: random.Random) -> None:
    """One process does not hear another, which hears it."""
    one, other = draw.sample(scene.names(), 2)
    scene.note(f"{other} does not hear {one}")
    scene.network.cut_one_way(one, other)
    await scene.pause(draw, 0.2, 4.0)
    scene.network.join(one, other)


async def cut_from_store(scene: Scene, draw: random.Random) -> None:
    """One process alone does not reach the store, or does not hear its answers."""
    name, network = draw.choice(scene.names()), scene.network
    pairs = draw.choice(([(name, STORE)], [(STORE, name)], [(name, STORE), (STORE, name)]))
    scene.note(f"cut {pairs}")
    for pair in pairs:
        network.cut_one_way(*pair)
    await scene.pause(draw, 0.2, 4.0)
    for pair in pairs:
        network.join(*pair)


async def reset_streams(scene: Scene, draw: random.Random) -> None:
    """Connections break while both of their ends live."""
    for call in scene.some_calls(draw):
        call.break_off()


async def half_open(scene: Scene, draw: random.Random) -> None:
    """Connections go silent; the server believes that the client listens."""
    for call in scene.some_calls(draw):
        call.go_silent()


async def duplicates(scene: Scene, draw: random.Random) -> None:
    """Calls arrive twice, the second time late."""
    scene.network.duplicate_rate = 0.3
    await scene.pause(draw, 0.5, 3.0)
    scene.network.duplicate_rate = 0.0


async def slow_network(scene: Scene, draw: random.Random) -> None:
    """Messages of one process, or all requests to the store, take up to seconds."""
    name, slowness = draw.choice([*scene.names(), STORE, STORE]), scene.network.slowness_s
    slowness[name] = draw.choice((0.05, 0.5, 2.0))
    scene.note(f"{name} is slow by {slowness[name]} s")
    await scene.pause(draw, 0.5, 3.0)
    slowness.pop(name, None)


async def corrupt_pages(scene: Scene, draw: random.Random) -> None:
    """KV arrives with wrong bytes."""
    scene.network.corrupt_page_rate = 0.2
    await scene.pause(draw, 0.5, 3.0)
    scene.network.corrupt_page_rate = 0.0


async def flaky_store(scene: Scene, draw: random.Random) -> None:
    """Requests and replies get lost."""
    weather = scene.weather
    weather.request_lost, weather.reply_lost = draw.uniform(0, 0.2), 0.2
    await scene.pause(draw, 0.2, 2.0)
    weather.request_lost = weather.reply_lost = 0.0


async def store_outage(scene: Scene, draw: random.Random) -> None:
    """Nobody gets an answer."""
    scene.weather.down = True
    await scene.pause(draw, 0.1, draw.choice((1.0, 3.0, 12.0)))
    scene.weather.down = False


async def store_restart(scene: Scene, draw: random.Random) -> None:
    """The store ends and comes back with all its data; connections break."""
    weather = scene.weather
    if scene.world.server.watch is not None:
        scene.world.server.watch.restarted()
    weather.restarting = True
    weather.restarts += 1
    await scene.pause(draw, 0.05, 1.0)
    weather.restarting = False


async def evicting_store(scene: Scene, draw: random.Random) -> None:
    """The store is set to drop keys when its memory is short, and set right again (P8)."""
    scene.weather.evicting = True
    await scene.pause(draw, 0.2, 2.0)
    scene.weather.evicting = False


async def late_switch(scene: Scene, draw: random.Random) -> None:
    """Moves stand still just before they end: much happens to what was verified."""
    scene.weather.switch_late_s = draw.choice((0.3, 1.0, 2.0))
    await scene.pause(draw, 0.5, 3.0)
    scene.weather.switch_late_s = 0.0


KINDS = (
    cut,
    cut_one_way,
    cut_from_store,
    reset_streams,
    half_open,
    duplicates,
    slow_network,
    corrupt_pages,
    flaky_store,
    store_outage,
    store_restart,
    evicting_store,
    late_switch,
)
