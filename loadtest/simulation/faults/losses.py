"""The store forgets what it had acknowledged."""

from __future__ import annotations

import random
from contextlib import aclosing
from typing import Any

import anyio
from sessile.v1 import types_pb2

from gateway.core.errors import SessileError
from loadtest.simulation.agents import Agent
from loadtest.simulation.faults.operators import move
from loadtest.simulation.faults.processes import kill_replica
from loadtest.simulation.faults.scene import Scene
from loadtest.simulation.network import Call

MAX_LOSS_S = 0.4
"""Acknowledged writes that a fail-over of the store may lose were made within this time."""
SAY_S = 3.0
"""How long a fault waits for a turn of its own."""


async def lose_writes(scene: Scene, draw: random.Random) -> None:
    """The store fails over and forgets what it has just acknowledged."""
    async with scene.losing:
        if _any_is_new(scene):
            return
        before = scene.world.server.snapshot()
        await scene.pause(draw, 0.02, MAX_LOSS_S)
        scene.note("writes are lost")
        scene.world.server.restore(before)


async def lose_writes_and_owner(scene: Scene, draw: random.Random) -> None:
    """The same, and a replica that could have repaired what it wrote dies too."""
    await lose_writes(scene, draw)
    await kill_replica(scene, draw)


async def lose_a_move(scene: Scene, draw: random.Random) -> None:
    """The store forgets that a session was moved and ran a turn where it went; another client
    has the old owner run a turn; while it does, somebody asks the new owner again, which goes
    back to what it wrote itself (P2)."""
    mover, other = draw.sample(sorted(scene.world.gateways), 2)
    async with scene.losing:
        agent = await _short_lived(scene, draw)
        await _say(scene, agent, other, "t0", 8)
        if _any_is_new(scene):
            return
        session = await scene.world.store.get_session(agent.session_id)
        owner = None if session is None else session.owner
        here = "" if owner is None else owner.replica.replica_id
        target = draw.choice([name for name in sorted(scene.world.replicas) if name != here])
        before = scene.world.server.snapshot()
        await move(scene, agent, target, mover)
        await _say(scene, agent, mover, "t1", 2)
        scene.note(f"the move of {agent.session_id} is lost")
        scene.world.server.restore(before)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_say, scene, agent, other, "t2", 60)
        await scene.pause(draw, 0.1, 0.3)
        await _say(scene, agent, mover, "t3", 2)


async def lose_a_turn(scene: Scene, draw: random.Random) -> None:
    """The store forgets a turn, whose replica dies; a proxy repeats its request, and other
    tokens of the same number take their place: the client that has the first must be told
    (P1)."""
    gateway = scene.gateway(draw)
    async with scene.losing:
        agent = await _short_lived(scene, draw)
        await _say(scene, agent, gateway, "t0", 8)
        if _any_is_new(scene):
            return
        before = scene.world.server.snapshot()
        first = await _say(scene, agent, gateway, "t1", 8)
        session = await scene.world.store.get_session(agent.session_id)
        owner = None if session is None else session.owner
        victim = scene.world.replicas.get("" if owner is None else owner.replica.replica_id)
        if first is None or victim is None or len(scene.world.live_replicas()) < 2:
            return
        scene.note(f"a turn of {agent.session_id} is lost, kill {victim.name}")
        scene.world.server.restore(before)
        scene.world.kill(victim)
    again = await _say(scene, agent, gateway, "t1", 8)
    if again is not None and again.end != first.end:
        last = await _say(scene, agent, gateway, "t2", 2, knows=first.end)
        agent.expect(last is None, f"P1: who knew of other tokens was told {last}")
    await scene.replace(victim)


async def _short_lived(scene: Scene, draw: random.Random) -> Agent:
    """A session of which the fault alone knows what is to become."""
    name, own = f"l{draw.getrandbits(24)}", random.Random(draw.random())
    agent = Agent(scene.world, name, own, lossy=True, brief=True)
    scene.agents.append(agent)
    await agent.open()
    await anyio.sleep(2 * MAX_LOSS_S)
    return agent


async def _say(
    scene: Scene,
    agent: Agent,
    gateway: str,
    turn_id: str,
    tokens: int,
    knows: types_pb2.Position | None = None,
) -> types_pb2.TurnFinished | None:
    """One turn of so many tokens; None if it did not come to its end."""
    request = types_pb2.RunTurnRequest(
        session_id=agent.session_id,
        turn_id=turn_id,
        messages=[types_pb2.Message(role=types_pb2.Message.ROLE_USER, content=turn_id)],
        params=types_pb2.SamplingParams(max_tokens=tokens, temperature=1, ignore_eos=True),
    )
    if knows is not None:
        request.precondition.head.CopyFrom(knows)
        request.precondition.turn_index = 2

    async def handler(app: Any, call: Call) -> None:
        await app.turns.run(agent.tenant, request, SAY_S, call.put)

    try:
        async with aclosing(scene.network.stream(gateway, handler, SAY_S)) as stream:
            async for message in stream:
                for event in types_pb2.TurnStream.FromString(message).events:
                    if event.HasField("finished"):
                        return event.finished
    except SessileError as error:
        scene.note(f"{turn_id} of {agent.session_id}: {error}")
    return None


def _any_is_new(scene: Scene) -> bool:
    """Clients would have to open their sessions again, if the store lost its last writes."""
    now = anyio.current_time()
    return any(not a.session_id or now - a.opened_at < 2 * MAX_LOSS_S for a in scene.agents)


KINDS = (
    lose_writes,
    lose_writes_and_owner,
    lose_a_move,
    lose_a_turn,
)
LOSSY = frozenset(kind.__name__ for kind in KINDS)
"""Clients may be told of a loss then."""
LOSSY_SHARE = 0.15
"""Of the histories."""
