"""Turns end by their deadline, whoever has given them up, and sessions go on once all is mended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.checkers.witness import TurnTimes, Witness
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.loop import run, true_time
from loadtest.simulation.phases import DEADLINE_SLACK_S, LIVENESS_S, _check_deadlines, _liveness
from loadtest.simulation.world import START_US, World
from tests.unit.simulation.small_world import lone

DUE_S = 30.0


def found(*, runs: bool = False, ended_s: float = 0.0, healed_s: float = 0.0) -> list[str]:
    """What is wrong with a turn that is due at 30 s; it may run on, or have ended at that time."""

    async def get_session(session_id: str) -> object:
        return SimpleNamespace(session_id=session_id, active_turn_id="t0" if runs else None)

    async def get_turn(session_id: str, turn_id: str) -> object:
        return SimpleNamespace(deadline_at_ms=START_US // 1000 + int(DUE_S * 1000))

    async def check() -> list[str]:
        store = SimpleNamespace(get_session=get_session, get_turn=get_turn)
        world = cast(World, SimpleNamespace(store=store, tenants={}))
        agent = lone(Agent, world, session_id="ses_a")
        ended = [TurnTimes("ses_b", "t1", DUE_S, ended_s, False)] if ended_s else []
        witness = SimpleNamespace(ended=ended, runs=lambda *_: runs)
        wrong = await _check_deadlines(world, [agent], cast(Witness, witness), healed_s)
        assert not runs or true_time() >= DUE_S + DEADLINE_SLACK_S
        return wrong

    return run(check, 1, None)


@pytest.mark.parametrize(
    ("runs", "ended_s", "healed_s", "rules"),
    [
        (False, 0.0, 0.0, []),
        (False, DUE_S + 1, 0.0, []),
        (False, DUE_S + DEADLINE_SLACK_S + 1, 0.0, ["I7"]),
        (False, DUE_S + DEADLINE_SLACK_S + 1, DUE_S + 2, []),
        (True, 0.0, 0.0, ["P4"]),
        (True, DUE_S + DEADLINE_SLACK_S + 1, 0.0, ["P4", "I7"]),
    ],
)
def test_a_turn_that_outlives_its_deadline_is_told(
    runs: bool, ended_s: float, healed_s: float, rules: list[str]
) -> None:
    wrong = found(runs=runs, ended_s=ended_s, healed_s=healed_s)
    assert [what.split(": ")[1] for what in wrong] == rules


class Healthy(Agent):
    """Its next turn ends like this after so long."""

    end = pb.TurnFinished(status=pb.TURN_STATUS_COMMITTED)
    timeout_ms = 20_000
    takes_s = 1.0

    async def turn(self) -> None:
        await anyio.sleep(self.takes_s)
        request = pb.RunTurnRequest(timeout_ms=self.timeout_ms)
        self.turns.append(TurnHeard("ses_a", "t9", request, finished=self.end))


def healthy(**what: Any) -> tuple[Healthy, list[str]]:
    """An agent with these fields, and what is wrong with its next turn while nothing is broken."""
    agent = lone(Healthy, **what)
    return agent, run(lambda: _liveness([agent]), 1, None)


LATE = pb.TurnFinished(status=pb.TURN_STATUS_FAILED, reason=pb.FINISH_REASON_DEADLINE)
STUCK = pb.TurnFinished(status=pb.TURN_STATUS_FAILED, reason=pb.FINISH_REASON_ERROR)


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ({}, 0),
        ({"takes_s": LIVENESS_S + 1}, 1),
        ({"end": STUCK}, 1),
        ({"end": LATE}, 1),
        ({"end": LATE, "timeout_ms": 500}, 0),
        ({"end": STUCK, "timeout_ms": 500}, 1),
        ({"end": pb.TurnFinished(status=pb.TURN_STATUS_CANCELLED)}, 0),
    ],
)
def test_a_turn_that_is_slow_or_fails_though_nothing_is_broken_is_told(
    what: dict[str, Any], wrong: int
) -> None:
    _, found = healthy(**what)
    assert [it.split(": ")[1] for it in found] == ["I7"] * wrong


@pytest.mark.parametrize(("field", "asks"), [("vanished", 1), ("closed", 0), ("brief", 0)])
def test_a_session_whose_client_has_left_goes_on_for_another_one(field: str, asks: int) -> None:
    agent, _ = healthy(known_head=pb.Precondition(turn_index=1), **{field: True})
    assert len(agent.turns) == asks
    assert (agent.known_head is None) == (field == "vanished")
