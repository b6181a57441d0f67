"""What must be true of a world after its faults have healed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sessile.v1 import session_pb2

from gateway.core.errors import (
    NotFound,
    SessionClosed,
    SessionSuspended,
    StaleClient,
    TurnCancelled,
    TurnInProgress,
)
from loadtest.simulation.checkers.checks import body_of, check_session
from loadtest.simulation.checkers.finality import UNREPAIRED
from loadtest.simulation.clients.agents import LOSS, Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.world import World
from statestore import keys
from statestore.records import ReplicaRef


async def check_agent(world: World, agent: Agent) -> list[str]:
    """Everything wrong with one agent's session, and with what was heard of it."""
    found = [*agent.violations, *check_answers(agent)]
    session = await world.store.get_session(agent.session_id)
    if session is not None and not agent.purged:
        ledger = await world.store.read_tokens(session, 0, session.head.length)
        turns = await world.store.get_turns(session, 0, 1000)
        salt = await world.store.tenant_salt(session.tenant)
        found += check_session(session, turns, ledger, salt, world.engine, agent.heard)
    else:
        found += [f"{it.turn_id}: {what}" for it in agent.heard for what in it.violations]
        if agent.purged:
            remains = [] if session is None else ["the session"]
            remains += _leftovers(world, agent.session_id)
            found += [f"I9: it was purged, {key} is there" for key in remains]
        else:
            found.append("P2: the session is gone")
    return [f"{agent.name} ({agent.session_id}): {what}" for what in found]


def check_answers(agent: Agent) -> list[str]:
    """Who asked beside the session's client was refused only for a reason that there was."""
    return [
        f"{heard.turn_id}: I7: another client of it: {type(heard.error).__name__}: {heard.error}"
        for heard in agent.others
        if heard.error is not None and not isinstance(heard.error, _reasons(agent, heard))
    ]


def _reasons(agent: Agent, heard: TurnHeard) -> tuple[type[BaseException], ...]:
    reasons: list[type[BaseException]] = []
    if heard.turn_id in agent.cancelled:
        reasons.append(TurnCancelled)
    if agent.closed or agent.operated:
        reasons += [SessionClosed, NotFound]
    if agent.suspensions or agent.operated or agent.minds_itself:
        reasons.append(SessionSuspended)
    if agent.asked_twice:
        reasons += [TurnInProgress, StaleClient]
    if agent.lossy:
        reasons += LOSS
    return tuple(reasons)


def check_losses(
    kinds: Sequence[str], agents: Sequence[Agent], has_lost: Callable[[str], bool]
) -> list[str]:
    """Who was told of a loss had one: the store ever lost something of the session (``has_lost``).
    While every owner lives, whatever it loses is put back (P1)."""
    found = [
        f"{agent.session_id}: P1: told of a loss, and the store has lost nothing of it"
        for agent in agents
        if agent.losses and not has_lost(agent.session_id)
    ]
    if set(kinds) != {"lose_writes"}:
        return found
    if any(agent.world.coverage[UNREPAIRED] for agent in agents):
        found.append(f"P1: though every owner lives, {UNREPAIRED}")
    return found + [
        f"{agent.session_id}: P1: told of a loss though every owner lives"
        for agent in agents
        if agent.losses
    ]


def _leftovers(world: World, session_id: str) -> list[str]:
    """Keys of a purged session, unless a fork needs them still."""
    refs = world.server.peek(keys.refs_key(session_id))
    if isinstance(refs, dict) and b"n:" + session_id.encode() in refs:
        return []
    mine = [keys.session_key(session_id), keys.ledger_key(session_id)]
    return [key for key in mine if world.server.peek(key) is not None]


async def check_seeds(world: World, agents: Sequence[Agent]) -> list[str]:
    """No two sessions draw the same noise, unless their clients chose the seed (P20)."""
    found: list[str] = []
    drawn: dict[int, str] = {}
    for agent in agents:
        session = await world.store.get_session(agent.session_id)
        if session is None:
            continue
        mine = {heard.turn_id for heard in agent.heard if heard.asks_for_no_seed}
        preamble = session_pb2.OpenSessionRequest.FromString(session.preamble)
        if preamble.default_params.HasField("seed"):
            mine = mine if session.parent_id is not None else set()
        for turn in await world.store.get_turns(session, 0, 1000):
            seed = body_of(turn).params.seed
            other = turn.spec.turn_id in mine and drawn.setdefault(seed, session.session_id)
            if other and other != session.session_id:
                found.append(f"{session.session_id}: P20: draws as {other} does")
    return found


async def check_named_apart(world: World, agents: Sequence[Agent]) -> list[str]:
    """Equal leading messages are named alike for one tenant, and otherwise for another (P19)."""
    found: list[str] = []
    names: dict[tuple[str, bytes], bytes] = {}
    for agent in agents:
        session = await world.store.get_session(agent.session_id)
        if session is None:
            continue
        said = session_pb2.OpenSessionRequest.FromString(session.preamble).messages
        leading = b"".join(message.SerializeToString(deterministic=True) for message in said)
        name = names.setdefault((session.tenant, leading), session.leading_digest)
        others = [n for (tenant, _), n in names.items() if tenant != session.tenant]
        if name != session.leading_digest or name in others:
            found.append(f"{session.session_id}: P19: its leading messages are named wrongly")
    return found


async def check_closed(
    world: World, agents: Sequence[Agent], closed: Agent, owner: ReplicaRef
) -> list[str]:
    """The last owner of a closed session holds no KV of it, but for what other sessions begin with
    too. Earlier owners may still have pages in their cache, which nothing protects. Where a turn
    ran when a session was purged, its last tokens cannot be known: nothing can be said then."""
    if any(agent.purged and agent.said_more for agent in agents):
        return []
    engine = world.replicas[owner.replica_id].engine

    async def names(agent: Agent) -> list[bytes]:
        session = await world.store.get_session(agent.session_id)
        tokens = agent.said if session is None else []
        if session is not None:
            tokens = list(await world.store.read_tokens(session, 0, session.head.length))
        return engine.block_hashes(await world.store.tenant_salt(agent.tenant), tokens)

    others = {name for agent in agents if agent is not closed for name in await names(agent)}
    mine = await names(closed)
    held, shared = engine.resident_pages(mine), sum(name in others for name in mine)
    if held <= shared:
        return []
    return [f"{closed.name}: I9: closed, {owner} holds {held} pages, {shared} are others' too"]


def check_replicas(world: World) -> list[str]:
    """Nothing runs any more, nothing is held, and the page books balance."""
    found: list[str] = []
    for replica in world.live_replicas():
        load = replica.engine.load()
        if load.running or load.queued:
            found.append(f"{replica.name}: I7: {load.running} generations run, {load.queued} wait")
        if load.free_pages != world.engine.capacity_pages:
            found.append(
                f"{replica.name}: I9: {world.engine.capacity_pages - load.free_pages} pages leaked"
            )
        try:
            replica.engine.check_integrity()
        except AssertionError as error:
            found.append(f"{replica.name}: P13: {error}")
    return found


def check_gone(world: World, agents: Sequence[Agent]) -> list[str]:
    """No live replica holds a closed session any more (I9)."""
    return [
        f"{agent.name} ({agent.session_id}): I9: closed, {replica.ref} holds it still"
        for agent in agents
        if agent.closed
        for replica in world.live_replicas()
        if replica.app is not None and agent.session_id in replica.app.session_ids()
    ]
