"""What must be true of a world after its faults have healed, recomputed from the ledger alone."""

from __future__ import annotations

from collections.abc import Sequence

from sessile.v1 import types_pb2 as pb

from loadtest.simulation.agents import Agent, TurnHeard
from loadtest.simulation.world import World
from statestore import keys
from statestore.digest import RollingDigest
from statestore.records import FinishReason, ReplicaRef, Session, Turn, TurnStatus
from workers.engines.sim.config import SimConfig
from workers.engines.sim.model import expected_output
from workers.text.byte_vocabulary import END_OF_TURN
from workers.text.bytes_codec import BytesCodec
from workers.text.port import ChatMessage, LastTurn, Role
from workers.turn.request import body_of, plan_of, preamble_of

STATUS = {
    pb.TURN_STATUS_COMMITTED: TurnStatus.COMMITTED,
    pb.TURN_STATUS_CANCELLED: TurnStatus.CANCELLED,
    pb.TURN_STATUS_FAILED: TurnStatus.FAILED,
}


async def check_agent(world: World, agent: Agent) -> list[str]:
    """Everything wrong with one agent's session."""
    session = await world.store.get_session(agent.session_id)
    if agent.purged:
        remains = [] if session is None else ["the session"]
        remains += _leftovers(world, agent.session_id)
        return [f"{agent.name}: {what}" for what in agent.violations] + [
            f"{agent.name}: I9: it was purged, {key} is there" for key in remains
        ]
    if session is None:
        return [f"{agent.name}: P2: the session is gone"]
    ledger = await world.store.read_tokens(session, 0, session.head.length)
    turns = await world.store.get_turns(session, 0, 1000)
    salt = await world.store.tenant_salt(session.tenant)
    found = [*agent.violations, *check_ledger(session, turns, ledger, salt, world.engine)]
    by_id = {turn.spec.turn_id: turn for turn in turns}
    for heard in [*agent.turns, *agent.others]:
        complaints = [*heard.violations]
        turn = by_id.get(heard.turn_id)
        if turn is not None:
            complaints += check_heard(heard, turn, ledger, salt)
        elif heard.start is not None:
            complaints.append("I7: it was accepted and is not in the ledger")
        found += [f"{heard.turn_id}: {complaint}" for complaint in complaints]
    return [f"{agent.name} ({agent.session_id}): {what}" for what in found]


def check_ledger(
    session: Session,
    turns: Sequence[Turn],
    ledger: Sequence[int],
    salt: bytes,
    engine: SimConfig,
) -> list[str]:
    """The turns cover the ledger without gap or overlap, each has ended, and each says what the
    model says after exactly the tokens before it."""
    found: list[str] = []
    if RollingDigest.of(salt, ledger).position() != session.head:
        found.append("I1: the ledger does not have its head's digest")
    if len(ledger) != session.head.length:
        return [*found, f"I1: {len(ledger)} tokens are there of {session.head.length}"]
    if len({turn.spec.turn_id for turn in turns}) != len(turns):
        found.append("I3: a turn id is in the ledger twice")
    end, last = 0, LastTurn.NONE
    for index, turn in enumerate(turns):
        name = turn.spec.turn_id
        if (turn.index, turn.input_start) != (index, end):
            found.append(f"{name}: I3: turn {turn.index} starts at {turn.input_start}, not {end}")
        if not turn.status.ended:
            found.append(f"{name}: I7: it is {turn.status}")
        given = ledger[turn.input_start : turn.output_start.length]
        if list(given) != rendered(session, turn, last):
            found.append(f"{name}: P4: its input is not in the ledger as given")
        found += [f"{name}: {what}" for what in check_output(turn, ledger, engine)]
        end = turn.output_end.length
        last = LastTurn.CLOSED if ledger[end - 1] == END_OF_TURN else LastTurn.OPEN
    if end != len(ledger):
        found.append(f"I1: the ledger has {len(ledger)} tokens, its turns end at {end}")
    return found


def rendered(session: Session, turn: Turn, last: LastTurn) -> list[int]:
    """A turn's input as it must have been tokenised."""
    messages = [ChatMessage(Role.USER, m.content) for m in body_of(turn.spec).messages]
    if last is LastTurn.NONE:
        leading = preamble_of(session.preamble).messages
        messages = [ChatMessage(Role.SYSTEM, m.content) for m in leading] + messages
    return BytesCodec().render(last, messages, [])


def check_output(turn: Turn, ledger: Sequence[int], engine: SimConfig) -> list[str]:
    """The output is what the model says, and ends where it should."""
    start, end = turn.output_start.length, turn.output_end.length
    output = list(ledger[start:end])
    plan = plan_of(body_of(turn.spec), output_start=start, info=engine.info(), eos=(END_OF_TURN,))
    expected = expected_output(
        ledger[:start],
        plan.rules.max_tokens,
        plan.sampling,
        engine.eos_probability,
        stop_token_ids=plan.rules.stop_token_ids,
    )
    folder = plan.folder(BytesCodec())()
    for count, token in enumerate(expected, 1):
        folder.push([token])
        if folder.stopped:
            expected = expected[:count]
            break
    if output != expected[: len(output)]:
        return ["I2: its output is not what the model says after this context"]
    if turn.status is TurnStatus.COMMITTED and output != expected:
        return [f"P5: it was committed after {len(output)} tokens of {len(expected)}"]
    if turn.result is None:
        return ["P5: it has no result"]
    if turn.status is TurnStatus.COMMITTED:
        by_stop = folder.stopped or expected[-1] in plan.rules.stop_token_ids
        if (turn.result.reason is FinishReason.STOP) != by_stop:
            return [f"P5: its reason is {turn.result.reason}"]
    return []


def check_heard(heard: TurnHeard, turn: Turn, ledger: Sequence[int], salt: bytes) -> list[str]:
    """What a client received is a prefix of the ledger's, and all of it once it was told so."""
    found: list[str] = []
    start, end = turn.output_start.length, turn.output_end.length
    output = list(ledger[start:end])
    if heard.start is not None and heard.start.length != start:
        found.append(f"I2: accepted at {heard.start.length}, not {start}")
    if heard.tokens != output[: len(heard.tokens)]:
        found.append("I2: the client has other tokens than the ledger")
    for length, digest in heard.digests.items():
        if digest != RollingDigest.of(salt, ledger[:length]).position().digest:
            found.append(f"P1: the digest told at {length} is not the ledger's")
            break
    finished = heard.finished
    if finished is None:
        return found
    if STATUS.get(finished.status) is not turn.status:
        found.append(f"I2: told {finished.status}, the ledger says {turn.status}")
    if finished.end.length != end or heard.tokens != output:
        found.append(f"I2: told the end at {finished.end.length} with {len(heard.tokens)} tokens")
    usage = (finished.usage.input_tokens, finished.usage.output_tokens)
    if usage != (start, len(output)):
        found.append(f"I2: told usage {usage} of {(start, len(output))}")
    return found


async def check_seeds(world: World, agents: Sequence[Agent]) -> list[str]:
    """No two sessions draw the same noise, unless their clients chose the seed (P20)."""
    found: list[str] = []
    drawn: dict[int, str] = {}
    for agent in agents:
        session = await world.store.get_session(agent.session_id)
        if session is None:
            continue
        own = [heard for heard in [*agent.turns, *agent.others] if heard.asks_for_no_seed]
        mine = {heard.turn_id for heard in own}
        if preamble_of(session.preamble).default_params.HasField("seed"):
            mine = mine if session.parent_id is not None else set()
        for turn in await world.store.get_turns(session, 0, 1000):
            seed = body_of(turn.spec).params.seed
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
        said = preamble_of(session.preamble).messages
        leading = b"".join(message.SerializeToString(deterministic=True) for message in said)
        name = names.setdefault((session.tenant, leading), session.leading_digest)
        others = [n for (tenant, _), n in names.items() if tenant != session.tenant]
        if name != session.leading_digest or name in others:
            found.append(f"{session.session_id}: P19: its leading messages are named wrongly")
    return found


def _leftovers(world: World, session_id: str) -> list[str]:
    """Keys of a purged session, unless a fork needs them still."""
    refs = world.server.peek(keys.refs_key(session_id))
    if isinstance(refs, dict) and b"n:" + session_id.encode() in refs:
        return []
    mine = [keys.session_key(session_id), keys.ledger_key(session_id)]
    return [key for key in mine if world.server.peek(key) is not None]


async def check_closed(
    world: World, agents: Sequence[Agent], closed: Agent, owner: ReplicaRef
) -> list[str]:
    """The last owner of a closed session holds no KV of it, but for what other sessions begin with
    too. Earlier owners may still have pages in their cache, which nothing protects. With those of
    purged sessions, whose tokens cannot be known any more, nothing can be said."""
    if any(agent.purged for agent in agents):
        return []
    engine = world.replicas[owner.replica_id].engine
    salt = await world.store.tenant_salt(closed.tenant)

    async def names(agent: Agent) -> list[bytes]:
        session = await world.store.get_session(agent.session_id)
        if session is None:
            return []
        tokens = await world.store.read_tokens(session, 0, session.head.length)
        return engine.block_hashes(salt, tokens)

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
