"""What forks begin with (P7, P20): their parent's tokens and turns up to a turn boundary, for ever.

The boundary is looked up in the parent's record when the fork is made, and the tokens up to it are
remembered. From then on, whatever happens to parent and ancestors (they go on, are written back
after a loss, are closed and purged), the fork has exactly these and then its own: in the store's
bytes, as a replica reads them through the store's adapter, and as its transcript tells them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sessile.v1 import session_pb2

from gateway.core.errors import SessileError
from loadtest.simulation.checkers.checks import check_output
from loadtest.simulation.checkers.ledgers import TOKEN_BYTES, Ledgers
from loadtest.simulation.world import World
from statestore import keys
from statestore.executor import Reply, ScriptCall
from statestore.records import Session

CALL_S = 5.0
TRIES = 8
"""Calls for a transcript, where nothing is broken any more."""

Record = dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Begun:
    """What a fork began with."""

    ends: tuple[int, ...]
    """Of each inherited turn: length of the ledger behind it."""
    tokens: bytes
    """Packed, up to the end of the last of them."""
    created: bytes
    """As its record says; a fork that the store has lost is made anew."""


class Forks:
    """Sees every script; ``violations`` are found while the world runs."""

    def __init__(self, world: World) -> None:
        self.violations: list[str] = []
        self._world = world
        self._ledgers = Ledgers(world.server.peek)
        self._begun: dict[str, Begun] = {}
        self._wrong: set[str] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Every script is seen meanwhile."""
        run_now = self._world.server.run_now

        def seen(call: ScriptCall) -> Reply:
            reply = run_now(call)
            self.saw(call, reply)
            return reply

        with mock.patch.object(self._world.server, "run_now", seen):
            yield

    def saw(self, call: ScriptCall, reply: Reply) -> None:
        """A script ran and gave this answer."""
        outcome = reply[0] if isinstance(reply, list) and reply else reply
        if call.script.name == "fork" and outcome == b"written":
            self._made(_session_id(call.keys[0]), _session_id(call.keys[1]), call.args[2])
        elif call.script.name == "purge":
            # Takes tokens that others may refer to.
            family = _family(_session_id(call.keys[0]))
            for session_id in self._begun:
                if _family(session_id) == family:
                    self._look(session_id)
        elif not call.script.name.startswith("read_"):
            for key in call.keys:
                if _session_id(key) in self._begun:
                    self._look(_session_id(key))

    def begun(self, session_id: str) -> Begun | None:
        """What a session began with, if it is a fork."""
        return self._begun.get(session_id)

    def tokens(self, session_id: str) -> list[int]:
        """All tokens of a fork that is stored: what it began with, and its own."""
        record, begun = self._record(session_id), self._begun[session_id]
        base = int(record[b"own_base"])
        own = self._ledgers.tokens(session_id, {**record, b"segments": b""})
        behind = own[TOKEN_BYTES * (len(begun.tokens) // TOKEN_BYTES - base) :]
        return _unpacked(begun.tokens + behind)

    def _made(self, parent_id: str, child_id: str, asked: object) -> None:
        parent, child = self._record(parent_id), self._record(child_id)
        known, created = self._begun.get(child_id), child[b"created"]
        if known is not None and known.created == created:
            return  # a repeat
        ends, turns = self._ends(parent_id, parent), int(child[b"turn_index"])
        wanted = len(ends) if asked in ("", b"") else int(str(asked))
        at = ends[turns - 1] if 0 < turns <= len(ends) else 0
        if (turns, int(child[b"length"])) != (wanted, at):
            self.violations.append(
                f"{child_id}: P20: forked at {int(child[b'length'])} after {turns} turns, its"
                f" parent's turn {wanted} ended at {at}"
            )
        tokens = self._ledgers.tokens(parent_id, parent)[: TOKEN_BYTES * at]
        self._begun[child_id] = Begun(tuple(ends[:turns]), tokens, created)
        self._look(child_id)

    def _ends(self, session_id: str, record: Record) -> list[int]:
        """Where the turns that have ended did so, those that were inherited first."""
        begun = self._begun.get(session_id)
        ends = [] if begun is None else [*begun.ends]
        for index in range(len(ends), int(record[b"turn_index"])):
            name = record[b"ti:%d" % index]
            ends.append(int(record[b"t:" + name + b":end_len"]))
        return ends

    def _look(self, session_id: str) -> None:
        record = self._record(session_id)
        if b"epoch" not in record:
            return  # closed and purged, or the store has lost it
        begun = self._begun[session_id].tokens
        there = self._ledgers.tokens(session_id, record)[: len(begun)]
        if there != begun and session_id not in self._wrong:
            self._wrong.add(session_id)
            self.violations.append(
                f"{session_id}: P7: of the {len(begun) // TOKEN_BYTES} tokens that it began with"
                f" {len(there) // TOKEN_BYTES} are there, or others"
            )

    def _record(self, session_id: str) -> Record:
        record = self._world.server.peek(keys.session_key(session_id))
        return record if isinstance(record, dict) else {}


async def check_forks(world: World, forks: Forks, session_ids: Sequence[str]) -> list[str]:
    """How these sessions read, as far as they are forks: through the store's adapter, as replicas
    read them, and as transcripts. Nothing may be broken any more."""
    found: list[str] = []
    for session_id in session_ids:
        session = await world.store.get_session(session_id)
        if session is not None and forks.begun(session_id) is not None:
            wrong = await _check_reading(world, forks, session)
            wrong = wrong or await _check_transcript(world, forks, session)
            found += [f"{session_id}: {what}" for what in wrong]
    return found


async def _check_reading(world: World, forks: Forks, session: Session) -> list[str]:
    """In one piece, and in two that part inside of what it began with, at its end or behind."""
    begun = forks.begun(session.session_id)
    assert begun is not None
    tokens, point = forks.tokens(session.session_id), len(begun.tokens) // TOKEN_BYTES
    for part in sorted({0, point // 2, point, (point + len(tokens)) // 2}):
        for start, end in ((0, part), (part, len(tokens))):
            read = await world.store.read_tokens(session, start, end)
            if read != tokens[start:end]:
                return [
                    f"P7: forked at {point}, tokens {start} to {end} read as {len(read)}, or as"
                    " others than its parent's to that point and its own"
                ]
    turns = await world.store.get_turns(session, 0, 1000)
    ends = tuple(turn.output_end.length for turn in turns[: len(begun.ends)])
    if ends != begun.ends:
        return [f"P7: its inherited turns end at {ends}, they ended at {begun.ends}"]
    return [
        f"P7: its turn {turn.spec.turn_id} does not go on from what it began with: {what}"
        for turn in turns[len(begun.ends) :]
        if turn.status.ended
        for what in check_output(turn, tokens, world.engine)
        if what.startswith("I2:")
    ]


async def _check_transcript(world: World, forks: Forks, session: Session) -> list[str]:
    request = session_pb2.GetTranscriptRequest(
        session_id=session.session_id, include_token_ids=True, max_turns=1000
    )

    async def transcript(app: Any) -> session_pb2.GetTranscriptResponse:
        told = await app.sessions.transcript(session.tenant, request)
        assert isinstance(told, session_pb2.GetTranscriptResponse)
        return told

    for number in range(TRIES):
        gateways = world.live_gateways()
        gateway = gateways[number % len(gateways)]
        try:
            told = await world.network.unary(gateway.name, transcript, CALL_S)
        except SessileError as error:
            refused = error
            continue
        tokens = [token for turn in told.turns for token in turn.token_ids]
        if tokens != forks.tokens(session.session_id):
            return [f"P7: its transcript has {len(tokens)} tokens, or others than it has"]
        return []
    return [f"P7: it cannot be read back: {type(refused).__name__}: {refused}"]


def _session_id(key: str) -> str:
    return key.rpartition(":s:")[2]


def _family(session_id: str) -> str:
    return session_id.removeprefix("ses_").partition(".")[0]


def _unpacked(data: bytes) -> list[int]:
    size = TOKEN_BYTES
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
