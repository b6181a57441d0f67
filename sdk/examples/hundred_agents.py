"""A hundred agents at once, with a progress bar.

    python hundred_agents.py [gateway's host:port] [agents]

Each agent is a session of a few turns that depend on one another. They share one client and its
connections; a fleet that is full refuses early and the client waits as long as it is told to.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable

from sessile import Priority, RetryPolicy, Sessile, Usage

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")
TURNS = 3
WIDTH = 40


async def agent(client: Sessile, number: int, turn_done: Callable[[Usage], None]) -> None:
    # Labels find the sessions of a job again: client.list(labels={"job": "hundred"}).
    labels = {"job": "hundred", "agent": str(number)}
    session = await client.open(system=f"You are agent {number}.", labels=labels)
    for turn in range(TURNS):
        result = await session.run(f"Step {turn}.", max_tokens=8).result()
        turn_done(result.usage)
    await session.close()


async def main(gateway: str, agents: int) -> None:
    done, total, input_tokens, cached_tokens = 0, agents * TURNS, 0, 0

    def turn_done(usage: Usage) -> None:
        nonlocal done, input_tokens, cached_tokens
        done += 1
        input_tokens += usage.input_tokens
        cached_tokens += usage.cached_tokens
        bar = "#" * (WIDTH * done // total)
        print(f"\r[{bar:{WIDTH}}] {done}/{total} turns", end="", file=sys.stderr, flush=True)

    began = time.monotonic()
    # A batch job has time: it lets others go first, and tries more often than the ten times of an
    # interactive client.
    patient = RetryPolicy(max_attempts=60)
    client = Sessile(gateway, priority=Priority.BATCH, retry=patient)
    # A task group: the first agent that fails ends the others, and their turns are cancelled.
    async with client, asyncio.TaskGroup() as tasks:
        for number in range(agents):
            tasks.create_task(agent(client, number, turn_done))
    print(file=sys.stderr)
    seconds = time.monotonic() - began
    share = cached_tokens / input_tokens if input_tokens else 0.0
    print(f"{agents} agents, {done} turns in {seconds:.1f} s, {share:.0%} of the input was cached")


if __name__ == "__main__":
    asyncio.run(
        main(
            sys.argv[1] if len(sys.argv) > 1 else GATEWAY,
            int(sys.argv[2]) if len(sys.argv) > 2 else 100,
        )
    )
