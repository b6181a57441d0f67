"""The store forgets what it had acknowledged."""

from __future__ import annotations

import random
from contextlib import aclosing
from typing import Any

import anyio
from sessile.v1 import types_pb2

from gateway.core.errors import DataLoss, SessileError, StaleClient, TurnInProgress
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.client import TRY_AGAIN
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.coverage import Row
from loadtest.simulation.faults.operators import move
from loadtest.simulation.faults.processes import kill_replica
from loadtest.simulation.faults.scene import Scene
from loadtest.simulation.network import Call
from loadtest.simulation.world import SimReplica
from statestore.digest import RollingDigest

MAX_LOSS_S = 0.4
"""Acknowledged writes that a fail-over of the store may lose were made within this time."""
SAY_S = 3.0
"""How long a fault waits for one stream of a turn of its own."""
PATIENCE_S = 12.0
"""How long for a turn by which it judges: it is asked for again and again."""
AGAIN_S = 0.2
NOT_YET = (*TRY_AGAIN, TurnInProgress)
"""Answers after which it is asked for again."""


async def lose_writes(scene: Scene, draw: random.Random) -> None:
    """The store fails over and forgets what it has just acknowledged."""
    async with scene.losing:
        if _any_is_new(scene):
            return
        before = scene.world.server.snapshot()
        await scene.pause(draw, 0.02, MAX_LOSS_S)
        if not _any_is_new(scene):
            scene.note("writes are lost")
            scene.world.server.restore(before)


async def lose_writes_and_owner(scene: Scene, draw: random.Random) -> None:
    """The same, and a replica that could have repaired what it wrote dies too."""
    await lose_writes(scene, draw)
    await kill_replica(scene, draw)


async def lose_a_move(scene: Scene, draw: random.Random) -> None:
    """The store forgets that a session was moved and ran a turn where it went; another client
    has the old owner run a turn; while it does, somebody asks the new owner again, which goes
    back to what it wrote itself (P2). Whose tokens are in the ledger no more must be told (P1)."""
    mover, other = draw.sample(sorted(scene.world.gateways), 2)
    async with scene.losing:
        agent = await _short_lived(scene, draw)
        await _say(scene, agent, other, "t0", 8)
        if _any_is_new(scene):
            return
        here = await _owner(scene, agent)
        names = [name for name in sorted(scene.world.replicas) if here is None or name != here.name]
        target = draw.choice(names)
        before = scene.world.server.snapshot()
        await move(scene, agent, target, mover)
        moved = await _say(scene, agent, mover, "t1", 2)
        if _any_is_new(scene):
            return
        scene.note(f"the move of {agent.session_id} is lost")
        scene.world.server.restore(before)
    heard = [moved]

    async def hear(gateway: str, turn_id: str, tokens: int) -> None:
        heard.append(await _say(scene, agent, gateway, turn_id, tokens, PATIENCE_S))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hear, other, "t2", 60)
        await scene.pause(draw, 0.1, 0.3)
        await hear(mover, "t3", 2)
    for known in heard:
        if await _is_told(scene, agent, mover, known):
            scene.saw(Row.STORE_LOSES_A_MOVE)


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
        victim = await _owner(scene, agent)
        alone = len(scene.world.live_replicas()) < 2
        if first.finished is None or victim is None or alone or _any_is_new(scene):
            return
        scene.note(f"a turn of {agent.session_id} is lost, kill {victim.name}")
        scene.world.server.restore(before)
        scene.world.kill(victim)
    again = await _say(scene, agent, gateway, "t1", 8, PATIENCE_S)
    repeated = again.finished is not None or isinstance(again.error, NOT_YET)
    # Of the repeat, too, the store may lose what this client has heard.
    lost = isinstance(again.error, DataLoss) and again.resume_from is not None
    repeated = repeated or (lost and not await _holds(scene, agent, again))
    agent.expect(repeated, f"P1: the repeat of a lost turn was told {again.error!r}")
    if await _is_told(scene, agent, gateway, first):
        scene.saw(Row.STORE_AND_OWNER)
    await scene.replace(victim)


async def _short_lived(scene: Scene, draw: random.Random) -> Agent:
    """A session of which the fault alone knows what is to become."""
    name, own = f"l{draw.getrandbits(24)}", random.Random(draw.random())
    agent = Agent(scene.world, name, own, lossy=True, brief=True)
    agent.minds_itself = True
    scene.agents.append(agent)
    await agent.open()
    await anyio.sleep(2 * MAX_LOSS_S)
    return agent


async def _owner(scene: Scene, agent: Agent) -> SimReplica | None:
    """The process that has the session, if there is one."""
    session = await scene.world.store.get_session(agent.session_id)
    if session is None or session.owner is None:
        return None
    replica = scene.world.replicas.get(session.owner.replica.replica_id)
    return replica if replica is not None and replica.ref == session.owner.replica else None


async def _say(
    scene: Scene,
    agent: Agent,
    gateway: str,
    turn_id: str,
    tokens: int,
    patience_s: float = 0.0,
    knows: TurnHeard | None = None,
) -> TurnHeard:
    """One turn of so many tokens, as one client hears it; for ``patience_s`` it is asked for again
    after errors that say so. ``knows``: the last turn that the client has."""
    request = types_pb2.RunTurnRequest(
        session_id=agent.session_id,
        turn_id=turn_id,
        messages=[types_pb2.Message(role=types_pb2.Message.ROLE_USER, content=turn_id)],
        params=types_pb2.SamplingParams(max_tokens=tokens, temperature=1, ignore_eos=True),
    )
    if knows is not None and knows.finished is not None:
        request.precondition.head.CopyFrom(knows.finished.end)
        request.precondition.turn_index = 1 + knows.index
    heard, until = TurnHeard(agent.session_id, turn_id, request), anyio.current_time() + patience_s
    while True:
        await _listen(scene, agent, gateway, heard)
        tried = isinstance(heard.error, NOT_YET) and anyio.current_time() < until
        if not tried:
            break
        heard.error = None
        await anyio.sleep(AGAIN_S)
    agent.violations += [f"{turn_id}: {what}" for what in heard.violations]
    scene.note(f"{turn_id} of {agent.session_id}: {heard.error or 'ended'}")
    return heard


async def _listen(scene: Scene, agent: Agent, gateway: str, heard: TurnHeard) -> None:
    """One stream of the turn, which ends it or leaves an error."""
    request = types_pb2.RunTurnRequest()
    request.CopyFrom(heard.request)
    if heard.resume_from is not None:
        request.resume_from.CopyFrom(heard.resume_from)

    async def handler(app: Any, call: Call) -> None:
        await app.turns.run(agent.tenant, request, SAY_S, call.put)

    heard.begin_stream()
    try:
        async with aclosing(scene.network.stream(gateway, handler, SAY_S)) as stream:
            async for message in stream:
                for event in types_pb2.TurnStream.FromString(message).events:
                    heard.hear(event)
        if not heard.ended:
            heard.violations.append("I2: a stream ended without an end")
    except SessileError as error:
        if heard.finished is None:
            heard.error = error


async def _is_told(scene: Scene, agent: Agent, gateway: str, known: TurnHeard) -> bool:
    """The client that has this turn goes on. Whether what it has is lost, and it is told so; to
    run another turn on other tokens, or to say anything else, is wrong (P1)."""
    if known.finished is None:
        cut_off = isinstance(known.error, DataLoss)
        fine = cut_off or isinstance(known.error, NOT_YET)
        agent.expect(fine, f"P1: the client of {known.turn_id} was told {known.error!r}")
        return cut_off and not await _holds(scene, agent, known)
    name = f"after {known.turn_id}"
    heard = await _say(scene, agent, gateway, name, 2, PATIENCE_S, known)
    held = await _holds(scene, agent, known)
    if isinstance(heard.error, NOT_YET):
        return False  # nobody could say anything all the while
    if heard.finished is not None and not await _holds(scene, agent, heard):
        return False  # the store has just lost this turn too: its owner is to repair it
    told = isinstance(heard.error, DataLoss | StaleClient)
    agent.expect(told or held, f"P1: who knew of other tokens was told {heard.error!r}")
    return told and not held


async def _holds(scene: Scene, agent: Agent, known: TurnHeard) -> bool:
    """The ledger has all that the client has of this turn."""
    place = known.resume_from if known.finished is None else known.finished.end
    session = await scene.world.store.get_session(agent.session_id)
    if session is None or place is None or session.head.length < place.length:
        return False
    tokens = await scene.world.store.read_tokens(session, 0, place.length)
    salt = await scene.world.store.tenant_salt(agent.tenant)
    return RollingDigest.of(salt, tokens).position().digest == place.digest


def _any_is_new(scene: Scene) -> bool:
    """Clients would have to open their sessions again, if the store lost its last writes: those
    that do so now, or did just before or since its state of a moment ago."""
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
