"""A job that goes on where it was after its process was killed.

    python resume_after_crash.py JOB [gateway's host:port]

Kill it at any moment and start it again under the same name: nothing is asked of the model twice,
and no tool is called again whose result the session already has. The program keeps no state: the
job's name makes each of its requests idempotent.
"""

import asyncio
import os
import sys
import time

import sessile
from sessile import Accepted, RoundEnded, Sessile

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")


@sessile.tool
def page(number: int) -> str:
    """The text of a page."""
    # The process may die between this call and the next turn; then it is made once more. What must
    # not happen twice takes this id as its idempotency key: it is the same in both processes.
    print(f"calling page({number}) as {sessile.current_call().id}", flush=True)
    time.sleep(0.7)  # reading takes a while
    return f"This is page {number}."


async def main(job: str, gateway: str) -> None:
    async with Sessile(gateway) as client:
        # The same request id gives the same session.
        session = await client.open(system="Read all pages.", tools=[page], request_id=job)
        # The same run id goes on with the same run. "detach": a Ctrl-C leaves the turn running too,
        # as a kill does, for the server's grace period (a minute unless configured otherwise).
        run = session.run_tools("Read.", run_id=job, on_abandon="detach", max_tokens=512)
        async for event in run:
            match event:
                case Accepted(turn_id=turn_id, attached=attached):
                    print(f"turn {turn_id} {'goes on' if attached else 'begins'}", flush=True)
                case RoundEnded(round=number):
                    print(f"round {number} ended", flush=True)
        print(f"answer: {(await run.result()).text}")
        await session.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else GATEWAY))
