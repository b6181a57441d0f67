"""Commands of turns and their clients, and for waiting."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import anyio
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import SessileError
from loadtest.simulation.clients.agents import TENANT
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.network import Call
from loadtest.simulation.scenario.script import Command
from loadtest.simulation.scenario.stage import CALL_S, CommandTable, Stage, table_of
from loadtest.simulation.scenario.transcript import Client, refusal


async def do_turn(stage: Stage, c: Command) -> None:
    """A client asks for a turn."""
    session, turn_id = c.words[:2]
    name = c.options.get("as", turn_id)
    params = pb.SamplingParams(max_tokens=int(c.options.get("max_tokens", 30)))
    params.ignore_eos = "eos" not in c.words
    if "stop" in c.options:
        params.stop.append(c.options["stop"])
    said = c.options.get("say", "What do you see from where you are?")
    request = pb.RunTurnRequest(
        session_id=stage.seen.sessions[session],
        turn_id=turn_id,
        messages=[pb.Message(role=pb.Message.ROLE_USER, content=said)],
        params=params,
        timeout_ms=int(float(c.options.get("timeout", 60)) * 1000),
    )
    if "after" in c.options:
        known = stage.seen.clients[c.options["after"]].heard
        assert known.finished is not None
        request.precondition.head.CopyFrom(known.finished.end)
        request.precondition.turn_index = known.index + 1
    client = Client(
        name,
        TurnHeard(request.session_id, turn_id, request),
        c.options.get("tenant", TENANT),
        float(c.options.get("slow", 0)),
    )
    stage.seen.clients[name] = client
    _listen(stage, client, request, stage.via(c))


async def do_again(stage: Stage, c: Command) -> None:
    """The same call a second time, by another client (or by one that forgot all it heard)."""
    _repeat(stage, c, attach_only=False)


async def do_attach(stage: Stage, c: Command) -> None:
    """The same, if the turn is there."""
    _repeat(stage, c, attach_only=True)


def _repeat(stage: Stage, c: Command, *, attach_only: bool) -> None:
    first, name = stage.seen.clients[c.words[0]], c.options["as"]
    request = pb.RunTurnRequest()
    request.CopyFrom(first.heard.request)
    request.attach_only = attach_only
    heard = TurnHeard(request.session_id, request.turn_id, request)
    client = stage.seen.clients[name] = Client(name, heard, first.tenant, 0.0)
    _listen(stage, client, request, stage.via(c))


async def do_resume(stage: Stage, c: Command) -> None:
    """The client goes on from the last token it has."""
    client = stage.seen.clients[c.words[0]]
    request = pb.RunTurnRequest()
    request.CopyFrom(client.heard.request)
    position = client.heard.resume_from
    if position is not None:
        request.resume_from.CopyFrom(position)
    _listen(stage, client, request, stage.via(c))


async def do_disconnect(stage: Stage, c: Command) -> None:
    """The client goes away."""
    stage.seen.clients[c.words[0]].scope.cancel()
    await stage.until(lambda: not stage.seen.clients[c.words[0]].listening, "")


def _listen(stage: Stage, client: Client, request: pb.RunTurnRequest, gateway: str) -> None:
    client.listening, client.scope = True, anyio.CancelScope()
    client.heard.begin_stream()

    async def handler(app: Any, call: Call) -> None:
        await app.turns.run(client.tenant, request, CALL_S, call.put)

    async def listen() -> None:
        try:
            with client.scope:
                stream = stage.world.network.stream(gateway, handler, CALL_S)
                async with aclosing(stream):
                    async for message in stream:
                        for event in pb.TurnStream.FromString(message).events:
                            client.heard.hear(event)
                            stage.seen.hear(client, event)
                        await anyio.sleep(client.slow_s)
        except SessileError as error:
            client.heard.error = error
            stage.seen.tell(client, refusal(error))
        finally:
            client.listening = False
            stage.seen.notify()

    stage.tasks.start_soon(listen, name=client.name)


async def do_until(stage: Stage, c: Command) -> None:
    """Waits until a client has heard that much."""
    name, *what = c.words
    client, before = stage.seen.clients[name], len(stage.seen.clients[name].kinds)

    def reached() -> bool:
        if what[-1] == "tokens" and len(client.heard.tokens) >= int(what[0]):
            return True
        return not client.listening or what[0] in client.kinds[before:]

    await stage.until(reached, name)


async def do_wait(stage: Stage, c: Command) -> None:
    """Lets time pass."""
    await anyio.sleep(float(c.words[0]))


async def do_join(stage: Stage, c: Command) -> None:
    """Waits for the commands in the background."""
    del c
    await stage.until(lambda: not stage.background, "join")


COMMANDS: CommandTable = table_of(
    do_turn,
    do_again,
    do_attach,
    do_resume,
    do_disconnect,
    do_until,
    do_wait,
    do_join,
)
