"""Who asks beside a session's client, for the same turn or for another one: second listeners, late
repeats, and a client that does not wait for the end of its turn."""

from __future__ import annotations

import anyio

from gateway.core.errors import NotFound
from loadtest.simulation.clients.client import Client
from loadtest.simulation.clients.heard import TurnHeard

REPEATS = 3


async def cancel_later(client: Client, heard: TurnHeard) -> None:
    """The turn is cancelled while it runs, perhaps."""
    await anyio.sleep(client.draw.uniform(0.0, 0.8))
    await client.cancel(heard.turn_id)


async def listen_too(client: Client, main: TurnHeard, until: float) -> None:
    """A second client of the same turn, from its beginning."""
    await anyio.sleep(client.draw.uniform(0.0, 1.0))
    heard = TurnHeard(main.session_id, main.turn_id, main.request)
    client.others.append(heard)
    while not heard.ended and anyio.current_time() < until:
        # Where the store loses writes this client may begin the turn anew.
        await client.listen(heard, attach_only=not client.lossy)
        if isinstance(heard.error, NotFound):
            heard.error = None  # the turn has not begun yet
            await client.back_off()


async def repeat_late(client: Client, main: TurnHeard) -> None:
    """A proxy of the client sends a request again that was answered long ago. If the store has
    lost the turn together with its owner, that begins another one of the same id."""
    for _ in range(REPEATS):
        await anyio.sleep(client.draw.uniform(0.0, 0.4))
        if client.vanished:
            return  # what it hears could be lost, and nobody would come to be told
        again = TurnHeard(main.session_id, main.turn_id, main.request)
        client.others.append(again)
        await client.listen(again)


async def ask_twice(client: Client, turn_id: str) -> None:
    """Another turn while one runs: refused, unless the first has just ended."""
    await anyio.sleep(client.draw.uniform(0.0, 0.5))
    heard = TurnHeard(client.session_id, turn_id, client.new_request(turn_id))
    heard.request.ClearField("precondition")
    client.others.append(heard)
    client.asked_twice = True
    while not heard.ended:
        await client.listen(heard)
