"""A client that sees or touches another tenant's session is told of (I10), and so is a transcript
that says something else than was heard (P17)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace as Some
from typing import Any

import pytest
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import NotFound, SessileError, SessionClosed
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.clients.tenancy import look_round
from loadtest.simulation.loop import run
from tests.unit.simulation.small_world import asked, lone

HIDDEN = NotFound("no session 'ses_b'")
Answer = SessileError | None


class Looker(Agent):
    """Is answered by an application that lists and refuses as told."""

    lists: tuple[str, ...] = ("ses_a",)
    says = "hello"
    touched: Answer = HIDDEN

    async def ask(self, what: Callable[[Any], Awaitable[Any]], *, repeatable: bool = True) -> Any:
        async def transcript(*_: object) -> object:
            turn = session_pb2.TranscriptTurn(turn_id="t0", output_text=self.says)
            return session_pb2.GetTranscriptResponse(turns=[turn])

        async def listed(*_: object) -> object:
            sessions = [session_pb2.Session(session_id=name) for name in self.lists]
            return session_pb2.ListSessionsResponse(sessions=sessions)

        async def touch(_: str, request: object, *__: object) -> object:
            if getattr(request, "session_id", "") == "ses_a":
                return await transcript()
            if self.touched is not None:
                raise self.touched
            return None

        sessions = Some(
            transcript=touch, list=listed, get=touch, fork=touch, cancel_turn=touch, close=touch
        )
        return await what(Some(sessions=sessions, turns=Some(run=touch)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("what", "rules"),
    [
        ({}, []),
        ({"lists": ("ses_a", "ses_b")}, ["I10"]),
        ({"says": "hell"}, ["P17"]),
        ({"touched": None}, ["I10"]),
        ({"touched": NotFound("no session 'ses_b' of yours")}, ["I10"]),
        ({"touched": SessionClosed("it is closed")}, ["I10"]),
    ],
    ids=["right", "listed", "another transcript", "let in", "told apart", "told of"],
)
def test_whoever_reaches_for_another_tenants_session_finds_none(
    what: dict[str, Any], rules: list[str], seed: int
) -> None:
    world = Some(tenants={"ses_a": "acme", "ses_b": "bravo"})
    agent = lone(Looker, world, session_id="ses_a", draw=random.Random(seed), **what)
    done = pb.TurnFinished(status=pb.TURN_STATUS_COMMITTED)
    agent.turns.append(TurnHeard("ses_a", "t0", asked("t0", "x"), text="hello", finished=done))
    run(lambda: look_round(agent), 1, None)
    assert [violation.split(": ")[0] for violation in agent.violations] == rules
