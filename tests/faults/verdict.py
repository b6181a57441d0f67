"""Every history is judged by the simulation's checkers, over the ledger read raw from the store."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile

import anyio
from redis.exceptions import RedisError
from sessile.v1 import fleet_pb2

from loadtest.simulation.checkers import checks
from statestore import keys
from statestore.digest import unpack_tokens
from statestore.records import Turn
from tests.faults.agents import Agent, Door, Heard
from tests.faults.engines import ENGINE
from tests.faults.fleet import Fleet

WATCH_PERIOD_S = 0.025
ENDED = (b"COMMITTED", b"CANCELLED", b"FAILED")


@dataclass(slots=True)
class Tally:
    """Counts over output tokens and turns; all but ``turns`` and ``tokens`` must be zero."""

    turns: int = 0
    tokens: int = 0
    lost: int = 0
    """In the ledger of a turn that its client saw end, and never received."""
    repeated: int = 0
    """Received more than once."""
    hung: int = 0
    """Turns that did not end, for their client or in the ledger."""
    violations: list[str] = field(default_factory=list)
    worst_gap_s: float = 0.0


async def judge(fleet: Fleet, agents: Sequence[Agent]) -> Tally:
    """Everything that was promised to these agents."""
    tally = Tally()
    for agent in agents:
        tally.violations += [f"{agent.name}: {what}" for what in agent.violations]
        if agent.session_id:
            found = await _judge_session(fleet, agent, tally)
            tally.violations += [f"{agent.name} ({agent.session_id}): {what}" for what in found]
    return tally


async def _judge_session(fleet: Fleet, agent: Agent, tally: Tally) -> list[str]:
    session = await fleet.records.get_session(agent.session_id)
    if session is None:
        return ["the session is gone"]
    raw = await fleet.raw.get(keys.ledger_key(agent.session_id))
    ledger = unpack_tokens(raw or b"")
    turns = await fleet.records.get_turns(session, 0, 1000)
    salt = await fleet.records.tenant_salt(session.tenant)
    found: list[str] = []
    if len(ledger) != session.head.length:
        return [f"I1: {len(ledger)} tokens are stored, the head is at {session.head.length}"]
    if fleet.engine.knows_its_tokens:
        found += checks.check_ledger(session, turns, ledger, salt, ENGINE)
    by_id = {turn.spec.turn_id: turn for turn in turns}
    for heard in agent.turns:
        complaints = [*heard.violations]
        turn = by_id.get(heard.turn_id)
        if turn is not None and not heard.given_up:
            complaints += _of_heard(fleet, heard, turn, ledger, salt)
        elif heard.start is not None and not heard.given_up:
            complaints.append("I7: it was accepted and is not in the ledger")
        found += [f"{heard.turn_id}: {complaint}" for complaint in complaints]
        if not heard.given_up:
            await _count(fleet, agent, heard, tally)
    return found


def _of_heard(
    fleet: Fleet, heard: Heard, turn: Turn, ledger: Sequence[int], salt: bytes
) -> list[str]:
    found = checks.check_heard(heard, turn, ledger, salt)
    if fleet.engine.knows_its_tokens:
        return found + checks.check_asked(heard, turn, ENGINE)
    # The checkers' text is that of the sim engine's vocabulary; see :func:`undisturbed`.
    return [what for what in found if not what.startswith("P17")]


async def _count(fleet: Fleet, agent: Agent, heard: Heard, tally: Tally) -> None:
    """By the fields of the stored hash alone."""
    names = (f"t:{heard.turn_id}:{name}" for name in ("status", "start_len", "end_len"))
    status, start, end = await fleet.raw.hmget(keys.session_key(agent.session_id), *names)
    tally.turns += 1
    tally.worst_gap_s = max(tally.worst_gap_s, heard.worst_gap_s)
    if status not in ENDED or not heard.ended:
        tally.hung += 1
        return
    received = Counter(
        position for _, first, count in heard.arrivals for position in range(first, first + count)
    )
    span = range(int(start), int(end))
    tally.tokens += len(span)
    tally.repeated += sum(count - 1 for count in received.values())
    if heard.finished is not None:
        tally.lost += sum(position not in received for position in span)


async def undisturbed(fleet: Fleet, agents: Sequence[Agent]) -> list[str]:
    """What an engine says whose tokens cannot be computed here: all turns once more, while nothing
    is broken, must give the same ledgers and texts. As another tenant, so that no KV page serves
    both."""
    found: list[str] = []
    for agent in agents:
        endpoints = {door.name: door.endpoint for door in agent.doors}
        twin = Agent(f"{agent.name}-again", endpoints, random.Random(0), tenant="undisturbed")
        try:
            await twin.open()
            for heard in agent.turns:
                await twin.repeat(heard)
            ours, theirs = [
                unpack_tokens(await fleet.raw.get(keys.ledger_key(one.session_id)) or b"")
                for one in (agent, twin)
            ]
            if ours != theirs:
                pairs = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
                same = len(list(pairs))
                found.append(f"{agent.name}: I2: undisturbed it says otherwise from {same} on")
            for heard, turn in zip(agent.turns, twin.turns, strict=True):
                if heard.text != turn.text:
                    found.append(
                        f"{agent.name}: {turn.turn_id}: P17: undisturbed it has other text"
                    )
                found += [f"{twin.name}: {turn.turn_id}: {what}" for what in turn.violations]
            await twin.close()
        finally:
            await twin.aclose()
    return found


class Watch:
    """Looks at sessions again and again while things break. I1: a ledger only grows, epochs only
    grow, an epoch has one owner. I3: one turn runs at most, what has ended stays as it ended."""

    def __init__(self, fleet: Fleet, agents: Sequence[Agent], *, lossy: bool) -> None:
        """``lossy``: the store itself may go back; then only one state at a time is judged."""
        self.violations: list[str] = []
        self.looks = 0
        self._fleet = fleet
        self._agents = agents
        self._lossy = lossy
        self._seen: dict[str, tuple[bytes, dict[bytes, bytes]]] = {}

    async def run(self) -> None:
        """Until cancelled. A store that does not answer is not looked at."""
        while True:
            for agent in self._agents:
                if agent.session_id:
                    with suppress(RedisError, OSError):
                        await self._look(agent.session_id)
            await anyio.sleep(WATCH_PERIOD_S)

    async def _look(self, session_id: str) -> None:
        ledger = await self._fleet.raw.get(keys.ledger_key(session_id)) or b""
        record = await self._fleet.raw.hgetall(keys.session_key(session_id))
        if not record:
            return
        self.looks += 1
        running = [
            name[2:-7]
            for name, value in record.items()
            if name[:2] == b"t:" and name[-7:] == b":status" and value not in ENDED
        ]
        active = [record[b"active"]] if record.get(b"active") else []
        wrong = [] if running == active else [f"I3: {running} run, {active} is active"]
        before = self._seen.get(session_id)
        self._seen[session_id] = ledger, record
        if before is not None and not self._lossy:
            wrong += _illegal(*before, ledger, record)
        self.violations += [f"{session_id}: {what}" for what in wrong]


def _illegal(
    old_ledger: bytes, old: dict[bytes, bytes], ledger: bytes, new: dict[bytes, bytes]
) -> list[str]:
    """What must not have become of a session between two looks."""
    wrong: list[str] = []
    if not ledger.startswith(old_ledger):
        wrong.append("I1: the ledger was rewritten")
    if int(new[b"epoch"]) < int(old[b"epoch"]):
        wrong.append(f"I1: epoch {new[b'epoch']!r} after {old[b'epoch']!r}")
    if new[b"epoch"] == old[b"epoch"] and old[b"owner"]:
        holder = [(r[b"nonce"], r[b"owner"], r[b"owner_inc"]) for r in (old, new)]
        if holder[0] != holder[1]:
            wrong.append(f"I1: {holder[0]} became {holder[1]} in one epoch")
    for name, value in old.items():
        if name[-7:] == b":status" and value in ENDED and new.get(name) != value:
            wrong.append(f"I3: {name!r} was {value!r}, is {new.get(name)!r}")
    return wrong


async def replicas(door: Door) -> dict[str, fleet_pb2.Replica]:
    """The fleet as one gateway sees it."""
    answer = await door.fleet.ListReplicas(fleet_pb2.ListReplicasRequest(), timeout=5.0)
    return {replica.ref.replica_id: replica for replica in answer.replicas}
