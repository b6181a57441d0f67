"""``make soak MINUTES=…``: agents work for so long under steady faults that end no process, and the
memory of every process, and of the store per session, is followed over time.

Faults that end processes are left out on purpose: the memory of a process can only be followed
while it lives. Fails on any violation, as ``make faults`` does, and on growth past its bounds
(``growth.py``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path

import anyio
from rich.console import Console

from statestore import keys
from tests.faults.agents import Agent
from tests.faults.catalogue import CLASSES
from tests.faults.children import rss_bytes
from tests.faults.fleet import Fleet, fleet
from tests.faults.growth import Sample, process_table, session_table, store_table, too_much
from tests.faults.remains import what_is_left
from tests.faults.rounds import AGENTS, FaultClass, Outcome, play
from tests.faults.servers import SingleStore
from tests.faults.verdict import judge

STEADY = ("-stop", "client-", "gateway-worker-", "worker-redis-")
TURNS_PER_SESSION = 150


class Soak:
    """One run."""

    def __init__(self, running: Fleet, seed: str, console: Console) -> None:
        self.outcomes: list[Outcome] = []
        self.samples: list[Sample] = []
        self.lasting: list[Agent] = []
        self.done_agents: list[Agent] = []
        self.sessions_opened = 0
        self._fleet = running
        self._seed = seed
        self._console = console
        self._over = anyio.Event()
        self._endpoints = {
            n.name: running.proxy.links[f"client:{n.name}"].endpoint for n in running.gateways
        }

    async def run(self, minutes: float, every_s: float) -> list[str]:
        """What was wrong in the end."""
        async with anyio.create_task_group() as tasks:
            for index in range(3):
                tasks.start_soon(self._live, index)
            tasks.start_soon(self._sample, every_s)
            await self._faults(anyio.current_time() + 60 * minutes)
            self._over.set()
        wrong = [what for outcome in self.outcomes for what in outcome.tally.violations]
        wrong += [f"{o.name} {o.index}: {o.unproven}" for o in self.outcomes if o.unproven]
        hung = [o for o in self.outcomes if o.tally.hung]
        wrong += [f"{o.name} {o.index}: {o.tally.hung} turns did not end" for o in hung]
        for agent in self.done_agents:
            await agent.aclose()
        wrong += too_much(self.samples)
        return wrong + await what_is_left(self._fleet) + self._fleet.complaints()

    async def _faults(self, until: float) -> None:
        draw = random.Random(self._seed)
        steady = [c for c in CLASSES if any(part in c.name for part in STEADY)]
        # A worker is killed to have a fail-over, and wherever two faults overlap.
        steady = [c for c in steady if c.store == "everysec" and "failover" not in c.name]
        steady = [c for c in steady if not c.name.startswith("both-")]
        index = 0
        while anyio.current_time() < until:
            chosen: FaultClass = draw.choice(steady)
            # Not every fifth index: there a namesake replaces the stopped process.
            number = draw.choice([0, 1, 2, 3, 5, 6, 7, 8])
            outcome = await play(self._fleet, chosen, number, f"{self._seed} {index}")
            self.outcomes.append(outcome)
            self.sessions_opened += AGENTS
            index += 1
            if outcome.failed:
                lines = [outcome.unproven, *outcome.proofs, *outcome.tally.violations]
                self._console.print(f"{outcome.name} {number} FAILED", *lines, sep="\n    ")
            if outcome.fleet_lost:
                return

    async def _live(self, number: int) -> None:
        """Lasting sessions, one after the other: many turns each, then closed."""
        index = 0
        while not self._over.is_set():
            agent = Agent(
                f"lasting-{number}-{index}", self._endpoints, random.Random(f"{number} {index}")
            )
            index += 1
            await agent.open()
            self.lasting.append(agent)
            self.sessions_opened += 1
            while not self._over.is_set() and len(agent.turns) < TURNS_PER_SESSION:
                await agent.turn(tokens=30)
                with anyio.move_on_after(0.2):
                    await self._over.wait()
            tally = await judge(self._fleet, [agent])
            self.outcomes.append(Outcome("lasting session", number, tally=tally))
            await agent.close()
            self.lasting.remove(agent)
            self.done_agents.append(agent)

    async def _sample(self, every_s: float) -> None:
        started = anyio.current_time()
        while not self._over.is_set():
            self.samples.append(await self._take(anyio.current_time() - started))
            with anyio.move_on_after(every_s):
                await self._over.wait()

    async def _take(self, at_s: float) -> Sample:
        raw = self._fleet.raw
        memory = await raw.info("memory")
        rss = {
            f"{node.name} ({node.process.pid})": rss_bytes(node.process.pid)
            for node in self._fleet.nodes.values()
        }
        rss["redis"] = rss_bytes(self._fleet.store.servers[0].process.pid)
        rss["this test"] = rss_bytes(os.getpid())
        sessions: dict[str, list[int]] = {}
        for agent in [*self.lasting]:
            used = 0
            for name in (keys.session_key(agent.session_id), keys.ledger_key(agent.session_id)):
                used += int(await raw.memory_usage(name, samples=0) or 0)
            sessions[agent.session_id] = [len(agent.turns), used]
        return Sample(
            at_s,
            rss,
            int(memory["used_memory"]),
            int(await raw.dbsize()),
            self.sessions_opened,
            sum(o.tally.turns for o in self.outcomes) + sum(len(a.turns) for a in self.lasting),
            sessions,
        )


async def soak(minutes: float, seed: str, console: Console) -> tuple[Soak, list[str]]:
    async with fleet(SingleStore("everysec")) as running:
        made = Soak(running, seed, console)
        return made, await made.run(minutes, max(2.0, minutes * 60 / 200))


def main() -> int:
    """Exit code 1 if anything was violated, unproven or left behind, or grew too much."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--report", type=Path, default=Path(".cache/soak-report.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    console = Console(width=None if sys.stdout.isatty() else 140)
    made, wrong = anyio.run(
        soak, options.minutes, options.seed, console, backend_options={"use_uvloop": True}
    )
    for table in (process_table, session_table, store_table):
        console.print(table(made.samples))
    faults = [o for o in made.outcomes if o.name != "lasting session"]
    turns = sum(o.tally.turns for o in made.outcomes)
    lost = sum(o.tally.lost for o in made.outcomes)
    repeated = sum(o.tally.repeated for o in made.outcomes)
    console.print(
        f"{len(faults)} faults, {turns} turns, {lost} tokens lost, {repeated} repeated,"
        f" {len(wrong)} complaints, seed {options.seed}"
    )
    for what in wrong:
        console.print(what, markup=False, highlight=False)
    report = {
        "seed": options.seed,
        "minutes": options.minutes,
        "faults": len(faults),
        "turns": turns,
        "complaints": wrong,
        "samples": [asdict(sample) for sample in made.samples],
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1))
    return 1 if wrong or lost or repeated else 0


if __name__ == "__main__":
    sys.exit(main())
