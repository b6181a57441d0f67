"""A session of two turns and what its client heard, made by the product's own codec, plan, fold and
digest: what the checkers are shown, right or with one thing wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.world import World
from statestore.digest import RollingDigest
from statestore.records import (
    NO_EPOCH,
    FinishReason,
    Position,
    Session,
    SessionState,
    Turn,
    TurnResult,
    TurnSpec,
    TurnStatus,
)
from workers.engines.sim.config import SimConfig
from workers.engines.sim.model import expected_output
from workers.text.byte_vocabulary import END_OF_TURN
from workers.text.bytes_codec import BytesCodec
from workers.text.port import ChatMessage, LastTurn, Role
from workers.turn.output import TurnOutput
from workers.turn.request import plan_of

SALT = b"salt of a tenant"
SYSTEM = "Be brief."
ENGINE = SimConfig(max_context_tokens=400, eos_probability=1 / 20)
INFO = ENGINE.info()
A = TypeVar("A", bound=Agent)
REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


@dataclass(frozen=True)
class Told:
    """A session as stored, and as heard."""

    session: Session
    turns: tuple[Turn, ...]
    ledger: tuple[int, ...]
    heard: tuple[TurnHeard, ...]

    def with_turn(self, at: int, /, **fields: Any) -> Told:
        """The same with another stored turn."""
        turns = list(self.turns)
        turns[at] = replace(turns[at], **fields)
        return replace(self, turns=tuple(turns))


def asked(turn_id: str, said: str, **params: Any) -> pb.RunTurnRequest:
    """A client's request."""
    return pb.RunTurnRequest(
        session_id="ses_a",
        turn_id=turn_id,
        messages=[pb.Message(role=pb.Message.ROLE_USER, content=said)],
        params=pb.SamplingParams(**params),
    )


def lone(
    kind: type[A], world: object = None, name: str = "a0", *, lossy: bool = False, **fields: Any
) -> A:
    """A client with these fields, of a world of which no more is there than it says."""
    seen = cast(World, SimpleNamespace(tenants={}) if world is None else world)
    agent = kind(seen, name, random.Random(1), lossy=lossy)
    for field, value in fields.items():
        assert hasattr(agent, field), field
        setattr(agent, field, value)
    return agent


def position(at: Position) -> pb.Position:
    return pb.Position(length=at.length, digest=at.digest)


def told(*requests: pb.RunTurnRequest) -> Told:
    """All of these turns, run to their end."""
    preamble = session_pb2.OpenSessionRequest(
        messages=[pb.Message(role=pb.Message.ROLE_SYSTEM, content=SYSTEM)]
    ).SerializeToString()
    ledger: list[int] = []
    turns, heard = [], []
    for index, request in enumerate(requests):
        turn, listener = _turn(index, request, ledger)
        turns.append(turn)
        heard.append(listener)
    session = Session(
        session_id="ses_a",
        tenant="acme",
        model="sim",
        state=SessionState.OPEN,
        owner=None,
        epoch=NO_EPOCH,
        head=RollingDigest.of(SALT, ledger).position(),
        turn_index=len(turns),
        active_turn_id=None,
        segments=(),
        own_base=0,
        preamble=preamble,
        leading_digest=b"",
        token_fingerprint=b"",
        labels=(),
        parent_id=None,
        migration=None,
        created_at_ms=0,
        updated_at_ms=0,
        previous_owner=None,
        version=1,
    )
    return Told(session, tuple(turns), tuple(ledger), tuple(heard))


def _turn(index: int, request: pb.RunTurnRequest, ledger: list[int]) -> tuple[Turn, TurnHeard]:
    """Adds the turn to the ledger."""
    start = len(ledger)
    messages = [ChatMessage(Role.USER, message.content) for message in request.messages]
    last = LastTurn.CLOSED if ledger and ledger[-1] == END_OF_TURN else LastTurn.OPEN
    if not ledger:
        last, messages = LastTurn.NONE, [ChatMessage(Role.SYSTEM, SYSTEM), *messages]
    ledger += BytesCodec().render(last, messages, [])
    body = pb.RunTurnRequest()
    body.CopyFrom(request)
    if not body.params.HasField("seed"):
        body.params.seed = 1000 + index
    plan = plan_of(body, output_start=len(ledger), info=INFO, eos=(END_OF_TURN,))
    before = RollingDigest.of(SALT, ledger)
    output = TurnOutput(before, plan.folder(BytesCodec()), plan.rules)
    said = expected_output(
        ledger,
        plan.rules.max_tokens,
        plan.sampling,
        ENGINE.eos_probability,
        min_new_tokens=plan.rules.min_tokens,
        stop_token_ids=plan.rules.stop_token_ids,
    )
    heard = TurnHeard("ses_a", request.turn_id, request)
    heard.hear(accepted(heard, position(before.position()), index, body.params.seed))
    for first in range(0, len(said), 7):
        output.push(said[first : first + 7])
        output.seal()
    event = output.event(0, len(output.tokens))
    assert event is not None
    heard.hear(pb.TurnEvent(tokens=event))
    output.end()
    assert output.reason is not None
    ledger += output.tokens
    end = RollingDigest.of(SALT, ledger).position()
    heard.hear(
        pb.TurnEvent(
            finished=pb.TurnFinished(
                status=pb.TURN_STATUS_COMMITTED,
                reason=REASONS[output.reason],
                usage=pb.Usage(
                    input_tokens=before.position().length, output_tokens=len(output.tokens)
                ),
                end=position(end),
                text_end=output.text_end,
                text=output.tail[0],
                text_offset=output.tail[1],
            )
        )
    )
    turn = Turn(
        spec=TurnSpec(request.turn_id, b"digest", body.SerializeToString(), 1000),
        index=index,
        status=TurnStatus.COMMITTED,
        attempt=1,
        input_start=start,
        output_start=before.position(),
        output_end=end,
        deadline_at_ms=0,
        result=TurnResult(TurnStatus.COMMITTED, output.reason, output.text_end),
    )
    return turn, heard


def accepted(heard: TurnHeard, start: pb.Position, index: int, seed: int) -> pb.TurnEvent:
    return pb.TurnEvent(
        accepted=pb.TurnAccepted(
            turn_id=heard.turn_id, output_start=start, turn_index=index, seed=seed
        )
    )


def other_tokens(tokens: Sequence[int], at: int) -> tuple[int, ...]:
    """The same but for one token."""
    changed = list(tokens)
    changed[at] = ord("z") if changed[at] != ord("z") else ord("y")
    return tuple(changed)
