"""Operators who drain, move, suspend, close and fork, whatever else happens."""

from __future__ import annotations

import random
from typing import Any

import anyio
from sessile.v1 import replica_pb2, session_pb2

from gateway.app.migration import MoveOptions
from gateway.core.errors import NotFound, SessileError
from loadtest.simulation.checkers.finality import made_final
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.lifecycle import fork
from loadtest.simulation.coverage import Row
from loadtest.simulation.faults.scene import OPERATOR_S, Scene
from loadtest.simulation.network import Call, SimReplicaClient
from loadtest.simulation.world import SimReplica

DRAIN_S = 4.0


async def drain(scene: Scene, draw: random.Random) -> None:
    """An operator empties a replica, which then ends and is started again."""
    victim = scene.replica(draw)
    if victim is None:
        return
    scene.note(f"drain {victim.name}")
    await _drain(scene, draw, victim, shutdown=True)
    await scene.pause(draw, 0.2, 0.5)
    if victim.ended:
        if not victim.process.stopped:  # by itself: nobody killed it meanwhile
            scene.saw(Row.DRAIN_ENDS)
    elif scene.world.replicas[victim.name] is victim:
        scene.world.kill(victim)  # what it still has is taken over
    await scene.replace(victim)


async def drain_and_undo(scene: Scene, draw: random.Random) -> None:
    """An operator empties a replica, which goes on; then it may be used again."""
    victim = scene.replica(draw)
    if victim is None:
        return
    scene.note(f"drain {victim.name}, which is to stay")
    await _drain(scene, draw, victim, shutdown=False)
    await scene.pause(draw, 0.0, 1.0)
    await undrain(scene, victim)


async def migrate(scene: Scene, draw: random.Random) -> None:
    """An operator moves a session."""
    agents = [agent for agent in scene.agents if agent.session_id and not agent.closed]
    if not agents:
        return
    agent = draw.choice(agents)
    async with anyio.create_task_group() as tasks:
        for _ in range(draw.choice((1, 1, 2, 4))):  # operators do not know of each other
            agent = draw.choice((agent, draw.choice(agents)))
            target = draw.choice(sorted(scene.world.replicas))
            tasks.start_soon(move, scene, agent, target, scene.gateway(draw))
        victim = scene.world.replicas.get(target)
        if draw.random() < 0.25 and victim in scene.world.live_replicas()[1:]:
            await scene.pause(draw, 0.0, 0.03)
            if victim is not None and not victim.ended:
                scene.note(f"kill {victim.name}")
                scene.world.kill(victim)
                await scene.pause(draw, 0.1, 1.0)
                await scene.replace(victim)


async def operate(scene: Scene, draw: random.Random) -> None:
    """An operator suspends, closes or forks a session, whatever it does just then."""
    agents = [a for a in scene.agents if a.may_be_operated]
    if not agents:
        return
    agent = draw.choice(agents)
    what = draw.choice(("suspend", "close", "fork", "fork"))
    scene.note(f"operator: {what} {agent.session_id}")
    if what == "fork":
        await fork(agent, scene.agents, f"{agent.name}.op{draw.getrandbits(24)}")
        return
    agent.operated = True
    session_id, tenant = agent.session_id, agent.tenant

    async def act(app: Any) -> Any:
        if what == "suspend":
            ask = session_pb2.SuspendSessionRequest(session_id=session_id)
            return await app.sessions.suspend(tenant, ask)
        end = session_pb2.CloseSessionRequest(session_id=session_id)
        return await app.sessions.close(tenant, end)

    async with made_final(agent):
        try:
            await scene.network.unary(scene.gateway(draw), act, OPERATOR_S)
        except SessileError as error:
            scene.note(f"operator: {what} {session_id}: {error}")


async def move(scene: Scene, agent: Agent, target: str, gateway: str) -> None:
    """An operator moves this session to this replica, through this gateway."""

    async def ask(app: Any) -> Any:
        session = await app.store.get_session(agent.session_id)
        if session is None:
            raise NotFound("it was purged")
        return await app.migrations.migrate(session, MoveOptions(target, 3.0))

    try:
        result = await scene.network.unary(gateway, ask, OPERATOR_S)
        scene.note(f"migrate {agent.session_id} to {target}: {result.moved} {result.detail}")
    except SessileError as error:
        scene.note(f"migrate {agent.session_id} to {target}: {error}")


async def _drain(scene: Scene, draw: random.Random, victim: SimReplica, *, shutdown: bool) -> None:
    async def handler(app: Any, call: Call) -> None:
        async for progress in app.drains.drain(victim.name, DRAIN_S, shutdown):
            await call.put(progress)

    last: Any = None
    try:
        steps = scene.network.stream(scene.gateway(draw), handler, 2 * DRAIN_S)
        async for step in steps:
            last = step
    except SessileError as error:
        scene.note(f"drain {victim.name}: {error}")
    if last is not None and last.moved_with_kv:
        scene.saw(Row.DRAIN_MOVES_IDLE)


async def undrain(scene: Scene, replica: SimReplica) -> None:
    """The replica may be used again, if it drains."""
    if replica.ref is None or not scene.world.server.is_draining(replica.ref):
        return
    client = SimReplicaClient(scene.network, replica.endpoint)
    try:
        await client.set_draining(replica_pb2.SetDrainingRequest(draining=False), OPERATOR_S)
    except SessileError as error:
        scene.note(f"undo the drain of {replica.name}: {error}")


KINDS = (
    drain,
    drain_and_undo,
    migrate,
    operate,
)
