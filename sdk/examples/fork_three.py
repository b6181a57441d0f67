"""Three continuations of one conversation; the longest is kept.

    python fork_three.py [gateway's host:port]

A fork shares its parent's history and copies nothing: the replica has the KV of the prefix already.
"""

import asyncio
import os
import sys

from sessile import Sessile, Session, TurnResult

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")


async def attempt(parent: Session, number: int) -> tuple[Session, TurnResult]:
    fork = await parent.fork(labels={"attempt": str(number)})
    # Each fork draws a seed of its own unless it is given one.
    return fork, await fork.run("Go on.", temperature=0.9, max_tokens=64).result()


async def main(gateway: str) -> None:
    async with Sessile(gateway) as client:
        story = await client.open(system="You tell stories.")
        begun = await story.run("Begin a story.", max_tokens=64).result()
        print(f"begins: {begun.text}")

        attempts = await asyncio.gather(*(attempt(story, number) for number in range(3)))
        for number, (_, result) in enumerate(attempts):
            shared = result.usage.cached_tokens
            print(f"attempt {number} ({shared} tokens were there already): {result.text}")

        best, kept = max(attempts, key=lambda one: len(one[1].text))
        # The others and even the parent may be closed: what the best one needs stays.
        for session in (story, *(fork for fork, _ in attempts if fork is not best)):
            await session.close()
        print(f"kept: {kept.text}")
        end = await best.run("End the story.", max_tokens=64).result()
        print(f"ends: {end.text}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else GATEWAY))
