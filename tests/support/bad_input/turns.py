"""Bad input to RunTurn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
from google.protobuf.message import Message
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.bad_input.rows import (
    LONG,
    OTHER_MODEL,
    PARAMS,
    SYSTEM,
    USER,
    Code,
    beyond,
    changed,
    message,
    row,
)
from tests.support.served_world import turn_request
from tests.support.situations import Case

for what, (given, told) in PARAMS.items():
    params = pb.SamplingParams(**given)
    row("RunTurn", what, changed("RunTurn", params=params), told)
row(
    "RunTurn",
    "a stop id that no token has",
    changed("RunTurn", params=pb.SamplingParams(stop_token_ids=[1 << 20])),
    "stop_token_ids must be below",
)


def again(turn_id: str = "first", **fields: Any) -> Callable[[Case], Message]:
    """RunTurn of a turn that was: with no messages, unless they are given."""
    return lambda c: pb.RunTurnRequest(session_id=c.session_id, turn_id=turn_id, **fields)


def knows(turns: int, tokens: int) -> Callable[[Case], Message]:
    def build(case: Case) -> Message:
        request = turn_request(case.session_id, "second")
        request.precondition.head.CopyFrom(beyond(case, tokens))
        request.precondition.turn_index = case.session.turn_index + turns
        return request

    return build


async def cancelled_before(case: Case) -> None:
    request = session_pb2.CancelTurnRequest(session_id=case.session_id, turn_id="second")
    (await case.served.call("CancelTurn", request)).check()


async def running(case: Case) -> None:
    request = turn_request(case.session_id, "second", max_tokens=400, ignore_eos=True)
    assert (await case.served.call("RunTurn", request, patience_s=0.5)).left


async def no_replica_of_its_model(case: Case) -> None:
    """The session is of a model whose only replica is gone."""
    case.session_id = await case.served.open(f"lone {case.session_id}", model=OTHER_MODEL)
    case.before = await case.served.session(case.session_id)
    case.served.world.kill(case.served.world.replicas["m"])
    await anyio.sleep(6)


TURNS: dict[str, tuple[Callable[[Case], Message], str]] = {
    "no turn id": (
        lambda c: pb.RunTurnRequest(session_id=c.session_id, messages=[message(USER)]),
        "turn_id has 1 to 128 characters",
    ),
    "a long turn id": (again(LONG, messages=[message(USER)]), "turn_id has 1 to 128 characters"),
    "no messages": (again("second"), "a new turn needs at least one message"),
    "a role not set": (again("second", messages=[message(0)]), "every message needs a role"),
    "a system message in the middle": (
        again("second", messages=[message(SYSTEM)]),
        "a session's first message",
    ),
    "1025 messages": (again("second", messages=[message(USER)] * 1025), "at most 1024 messages"),
    "messages over 4 MiB": (
        again("second", messages=[message(USER, "x" * (4 << 20))]),
        "at most 4194304 bytes",
    ),
    "a day and more": (
        changed("RunTurn", timeout_ms=86_400_001),
        "timeout_ms is at most 86400000",
    ),
    "a priority of the future": (
        changed("RunTurn", priority=99),
        "a turn is interactive (1) or batch (2)",
    ),
    "resumed before its output": (
        again(resume_from=pb.Position(length=1)),
        "lies before the turn's output",
    ),
}
for what, (build, told) in TURNS.items():
    row("RunTurn", what, build, told)
row(
    "RunTurn",
    "input over the context",
    again("second", messages=[message(USER, "x" * 3000)]),
    "Send less input",
    Code.INVALID_ARGUMENT,
    "CONTEXT_TOO_LONG",
)
for state, arrange in {"ended": None, "running": running}.items():
    row(
        "RunTurn",
        f"the id of one that has {state}, with other input",
        again("first" if state == "ended" else "second", messages=[message(USER, "other")]),
        "Use a new turn id",
        Code.ALREADY_EXISTS,
        "TURN_ID_REUSED",
        arrange,
    )
row(
    "RunTurn",
    "the id of one that was cancelled before it began",
    changed("RunTurn"),
    "use a new one",
    Code.ABORTED,
    "TURN_CANCELLED",
    cancelled_before,
)
row(
    "RunTurn",
    "attached to none",
    again("second", attach_only=True),
    "Check the id",
    Code.NOT_FOUND,
    "TURN_NOT_FOUND",
)
row(
    "RunTurn",
    "resumed past its end",
    lambda c: again(resume_from=beyond(c, 5))(c),
    "Fork from the last turn",
    Code.DATA_LOSS,
    "DATA_LOSS",
)
row(
    "RunTurn",
    "resumed in another history",
    lambda c: again(resume_from=beyond(c, -1, b"d" * 16))(c),
    "Fork from the last turn",
    Code.DATA_LOSS,
    "DATA_LOSS",
)
row(
    "RunTurn",
    "a client that knows more",
    knows(1, 5),
    "Fork from the last turn",
    Code.DATA_LOSS,
    "DATA_LOSS",
)
row(
    "RunTurn",
    "a client that knows less",
    knows(-1, -5),
    "Read the transcript",
    Code.FAILED_PRECONDITION,
    "STALE_CLIENT",
)
row(
    "RunTurn",
    "no replica of that model",
    changed("RunTurn", timeout_ms=2000),
    "no replica can take the session",
    Code.UNAVAILABLE,
    "UNAVAILABLE",
    no_replica_of_its_model,
)
