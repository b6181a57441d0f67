"""Commands for processes, their network and their store."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from loadtest.simulation.network import Call
from loadtest.simulation.redis import Fault
from loadtest.simulation.scenario.script import Command
from loadtest.simulation.scenario.stage import CALL_S, CommandTable, Loss, Stage, table_of


async def do_fleet(stage: Stage, c: Command) -> None:
    """Starts processes, configured so."""
    middle = c.words.index("gateways")
    for setting, value in c.options.items():
        stage.configure(setting, value)
    for name in c.words[:middle]:
        await stage.world.start_replica(name)
    for name in c.words[middle + 1 :]:
        stage.world.start_gateway(name)
    await stage.until_ready()
    stage.seen.say(f"{', '.join(c.words[:middle])} ready")


async def do_start(stage: Stage, c: Command) -> None:
    """Starts a process of this name."""
    (name,) = c.words
    for setting, value in c.options.items():
        stage.configure(setting, value)
    if name in stage.world.gateways or name.startswith("g"):
        stage.world.start_gateway(name)
    else:
        await stage.world.start_replica(name)
    await stage.until_ready()


async def do_kill(stage: Stage, c: Command) -> None:
    """As SIGKILL."""
    stage.world.kill(stage.node(c))


async def do_freeze(stage: Stage, c: Command) -> None:
    """As SIGSTOP."""
    stage.node(c).process.stop()


async def do_thaw(stage: Stage, c: Command) -> None:
    """As SIGCONT."""
    stage.node(c).process.resume()


async def do_cut(stage: Stage, c: Command) -> None:
    """Two processes, or one and the store, do not hear each other."""
    if c.words[1] == "store":
        stage.storeless.add(c.words[0])
    else:
        stage.world.network.cut(*c.words)


async def do_heal(stage: Stage, c: Command) -> None:
    """Ends every cut."""
    del c
    stage.storeless.clear()
    stage.world.network.heal()


async def do_corrupt(stage: Stage, c: Command) -> None:
    """Pages arrive with wrong bytes, or nothing does any more."""
    stage.world.network.corrupt_page_rate = float(c.words == ("pages",))


async def do_drain(stage: Stage, c: Command) -> None:
    """An operator empties a replica."""
    name, shutdown = c.words[0], "shutdown" in c.words
    limit_s = float(c.options.get("timeout", 10))
    last: Any = None

    async def handler(app: Any, call: Call) -> None:
        async with aclosing(app.drains.drain(name, limit_s, shutdown)) as progress:
            async for step in progress:
                await call.put(step)

    messages = stage.world.network.stream(stage.via(c), handler, CALL_S)
    async with aclosing(messages) as steps:
        async for step in steps:
            last = step
    stage.seen.say(
        f"drain {name}: {last.moved_with_kv} moved with KV, {last.moved_without_kv} without,"
        f" {last.remaining} left"
    )


async def do_store(stage: Stage, c: Command) -> None:
    """The store is down, or up again."""
    stage.world.weather.down = c.words == ("down",)


async def do_lose(stage: Stage, c: Command) -> None:
    """Acknowledged writes, in a fail-over of the store; or one request or reply to come."""
    if c.words[1:] == ("writes",):
        before = stage.watch.before
        for _ in range(int(c.words[0]) - 1):
            before.pop()
        stage.world.server.restore(before.pop())
    else:
        fault = {"request": Fault.REQUEST_LOST, "reply": Fault.REPLY_LOST}[c.words[0]]
        stage.losses.append(Loss(fault, c.options["of"]))


COMMANDS: CommandTable = table_of(
    do_fleet,
    do_start,
    do_kill,
    do_freeze,
    do_thaw,
    do_cut,
    do_heal,
    do_corrupt,
    do_drain,
    do_store,
    do_lose,
)
