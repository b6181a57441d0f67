"""What sessions and turns take: memory of gateway, worker and store, and operations of the store.

    python -m loadtest.bench.footprint [--sessions 2000] [--running 200]

Real processes on loopback: a store, a gateway, a worker with the sim engine. Memory of a process is
its resident set, so a figure is the slope over many sessions or turns, not what one takes: the
allocators keep and reuse. Memory of the store is what it says that it uses. Its commands are
counted by itself, those that scripts make included, less what the idle fleet makes in as long.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import anyio
import psutil
from redis import Redis
from sessile import Accepted, Sessile, Session

from gateway.cli.launch import Cluster

AT_ONCE = 16
"""Calls of this client, while it prepares."""
TOKENS = 32
"""Of a turn, which has about as many of input."""
TURNS = 300
LONG_TURN_TOKENS = 20_000
"""More than a turn makes while it is looked at."""
ENGINE = {
    "step_ms": "2",
    "decode_token_ms": "0",
    "prefill_token_ms": "0",
    "eos_probability": "0",
    "max_running": "1024",
    "capacity_pages": "1000000",
}
IDLE_S = 10.0
SCRIPTS = ("cmdstat_evalsha", "cmdstat_evalsha_ro", "cmdstat_eval", "cmdstat_fcall")


@dataclass(frozen=True, slots=True)
class Look:
    """Everything at one moment: bytes, and counts since the store's start."""

    at_s: float
    gateway: int
    worker: int
    store: int
    scripts: int
    """Scripts: every access to the store is one."""
    commands: int
    """All commands, those inside of scripts included."""
    received: int
    sent: int

    def since(self, before: Look) -> Look:
        return Look(*(getattr(self, one.name) - getattr(before, one.name) for one in fields(Look)))


class Fleet:
    """One that is looked at."""

    def __init__(self, cluster: Cluster, client: Sessile) -> None:
        self.client = client
        self._gateway = psutil.Process(cluster.gateways[0].pid)
        self._worker = psutil.Process(cluster.workers[0].pid)
        self._store = Redis.from_url(cluster.redis_url)

    def look(self) -> Look:
        info: Any = self._store.info("all")
        statistics = {name: one for name, one in info.items() if name.startswith("cmdstat_")}
        commands = sum(one["calls"] for one in statistics.values())
        return Look(
            time.monotonic(),
            self._gateway.memory_info().rss,
            self._worker.memory_info().rss,
            info["used_memory"],
            sum(statistics[name]["calls"] for name in SCRIPTS if name in statistics),
            commands,
            info["total_net_input_bytes"],
            info["total_net_output_bytes"],
        )

    async def sessions(self, count: int) -> list[Session]:
        """New sessions, each with one turn."""
        found: list[Session] = []

        async def open_some(share: int) -> None:
            for _ in range(share):
                session = await self.client.open(system="You are a careful agent. " * 4)
                await run(session)
                found.append(session)

        async with anyio.create_task_group() as tasks:
            for number in range(AT_ONCE):
                tasks.start_soon(open_some, count // AT_ONCE + (number < count % AT_ONCE))
        return found


async def run(session: Session) -> None:
    """A short turn."""
    await session.run("What is the weather like?", max_tokens=TOKENS, ignore_eos=True).result()


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    """A gateway, a worker, their store."""
    async with Cluster(engine="sim", engine_options=ENGINE) as cluster:
        await cluster.start(gateways=1, workers=1)
        async with Sessile(cluster.targets) as client:
            yield Fleet(cluster, client)


async def measure(sessions: int, running: int) -> dict[str, Any]:
    """Figures by what is counted; bytes unless named otherwise."""
    async with fleet() as one:
        some = await one.sessions(AT_ONCE * 4)  # what everything needs once is there now
        before = one.look()
        await anyio.sleep(IDLE_S)
        idle = one.look().since(before)
        before = one.look()
        some += await one.sessions(sessions)
        opened = one.look().since(before)
        before = one.look()
        for _ in range(TURNS):
            await run(some[0])
        turns = one.look().since(before)
        running_turns = await _running(one, some[:running])
    return {
        "idle_per_s": {
            name: round(value / idle.at_s, 1)
            for name, value in asdict(idle).items()
            if name in ("scripts", "commands", "received", "sent")
        },
        "idle_session": {
            name: round(getattr(opened, name) / sessions) for name in ("gateway", "worker", "store")
        },
        "turn": {
            "tokens": TOKENS,
            "store": round(turns.store / TURNS),
            **{
                name: round(
                    (getattr(turns, name) - getattr(idle, name) * turns.at_s / idle.at_s) / TURNS, 1
                )
                for name in ("scripts", "commands", "received", "sent")
            },
        },
        "running_turn": running_turns,
    }


async def _running(one: Fleet, sessions: list[Session]) -> dict[str, int]:
    """Bytes a turn, while one of each session runs."""
    before = one.look()
    began = anyio.Event()
    waiting = len(sessions)

    async def follow(session: Session) -> None:
        nonlocal waiting
        turn = session.run("Go on.", max_tokens=LONG_TURN_TOKENS, ignore_eos=True)
        async with aclosing(aiter(turn)) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    waiting -= 1
                    if not waiting:
                        began.set()

    async with anyio.create_task_group() as tasks:
        for session in sessions:
            tasks.start_soon(follow, session)
        await began.wait()
        found = one.look().since(before)
        tasks.cancel_scope.cancel()
    return {name: round(getattr(found, name) / len(sessions)) for name in ("gateway", "worker")}


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--running", type=int, default=200)
    options = parser.parse_args()
    sys.stdout.write(
        json.dumps(anyio.run(measure, options.sessions, options.running), indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
