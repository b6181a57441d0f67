"""What an agent makes of the end of its turns, and that nothing it heard is dropped."""

from __future__ import annotations

from typing import Any

import pytest
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from loadtest.simulation.checkers.aftermath import check_answers
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from tests.unit.simulation.small_world import asked, lone

COMMITTED = pb.TurnFinished(status=pb.TURN_STATUS_COMMITTED, end=pb.Position(length=9))
FAILED = pb.TurnFinished(status=pb.TURN_STATUS_FAILED)


def agent(**fields: Any) -> Agent:
    """One that has heard a turn."""
    it = lone(Agent, **fields)
    it.turns.append(ended("t0", finished=COMMITTED, violations=["I2: said once"]))
    return it


def ended(turn_id: str, **fields: Any) -> TurnHeard:
    return TurnHeard("ses_a", turn_id, asked(turn_id, "x"), pb.Position(length=4), **fields)


@pytest.mark.parametrize(
    ("it", "last", "rule"),
    [
        (agent(), ended("t1", finished=COMMITTED), ""),
        (agent(cancelled={"t1"}), ended("t1", error=errors.TurnCancelled("t1")), ""),
        (agent(), ended("t1", error=errors.TurnCancelled("t1")), "I7: t1: TurnCancelled"),
        (agent(), ended("t1", error=errors.DataLoss("lost")), "I7: t1: DataLoss"),
        (agent(lossy=True), ended("t1", error=errors.DataLoss("lost")), ""),
        (agent(lossy=True), ended("t1", error=errors.NotFound("t1")), "I7: t1: NotFound"),
        (agent(poison=True), ended("t1", finished=FAILED), ""),
        (agent(poison=True), ended("t1", finished=COMMITTED), "P10: t1 kills its replicas"),
        (agent(poison=True), ended("t1", error=errors.Unavailable("x")), "P10: t1 kills"),
        (agent(operated=True, closed=True), ended("t1", error=errors.SessionClosed("x")), ""),
        (agent(), ended("t1", error=errors.SessionClosed("x")), "I7: t1: SessionClosed"),
        (agent(operated=True, closed=True), ended("t1", error=errors.DataLoss("x")), "I7: t1"),
    ],
)
def test_a_turn_ends_as_it_may_or_the_rule_is_named(it: Agent, last: TurnHeard, rule: str) -> None:
    it.turns.append(last)
    it._conclude(last)
    assert len(it.violations) == bool(rule)
    assert all(rule in what for what in it.violations)


@pytest.mark.parametrize("error", [errors.DataLoss("x"), errors.StaleClient("x")])
def test_a_loss_gives_up_what_was_heard_before_and_keeps_what_was_wrong(
    error: errors.SessileError,
) -> None:
    it, last = agent(lossy=True), ended("t1", error=error)
    other = ended("t0", violations=["I2: said to another"])
    it.turns.append(last)
    it.others.append(other)
    it._conclude(last)
    assert all(heard.given_up for heard in it.heard)
    assert it.losses == 1
    wrong = [what for heard in it.heard for what in heard.violations]
    assert wrong == ["I2: said once", "I2: said to another"]


def test_a_cancelled_turn_is_judged_like_any_other() -> None:
    it, last = agent(lossy=True), ended("t1", error=errors.TurnCancelled("t1"))
    it.cancelled.add("t1")
    it.turns.append(last)
    it._conclude(last)
    assert [heard.given_up for heard in it.turns] == [False, False]


def test_one_turn_alone_can_be_given_up() -> None:
    it = agent(lossy=True)
    it.turns.append(ended("t1"))
    it.others.append(ended("t1"))
    it.give_up("t1")
    assert [(heard.turn_id, heard.given_up) for heard in it.heard] == [
        ("t0", False), ("t1", True), ("t1", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("it", "error", "wrong"),
    [
        (agent(), None, False),
        (agent(), errors.DataLoss("x"), True),
        (agent(), errors.InternalError("x"), True),
        (agent(lossy=True), errors.DataLoss("x"), False),
        (agent(lossy=True), errors.InternalError("x"), True),
        (agent(), errors.TurnCancelled("x"), True),
        (agent(cancelled={"t1"}), errors.TurnCancelled("x"), False),
        (agent(cancelled={"t0"}), errors.TurnCancelled("x"), True),
        (agent(), errors.SessionClosed("x"), True),
        (agent(closed=True), errors.SessionClosed("x"), False),
        (agent(), errors.SessionSuspended("x"), True),
        (agent(suspensions=1), errors.SessionSuspended("x"), False),
        (agent(), errors.TurnInProgress("x"), True),
        (agent(asked_twice=True), errors.TurnInProgress("x"), False),
        (agent(), errors.TurnConflict("x"), True),
    ],
)
def test_another_client_is_refused_only_for_a_reason(
    it: Agent, error: errors.SessileError | None, wrong: bool
) -> None:
    it.others.append(ended("t1", error=error))
    assert len(check_answers(it)) == wrong


def test_an_operator_keeps_out_of_what_minds_itself() -> None:
    assert not agent().may_be_operated  # it has no session yet
    assert agent(session_id="ses_a").may_be_operated
    assert agent(session_id="ses_a", lossy=True).may_be_operated
    for name in ("closed", "minds_itself", "operated", "poison"):
        assert not agent(session_id="ses_a", **{name: True}).may_be_operated


def test_a_slow_reader_is_not_waited_for_where_writes_are_lost() -> None:
    for lossy, lags, waits_for in (
        (False, False, "t1"), (False, True, "t1"), (True, False, "t1"), (True, True, None),
    ):  # fmt: skip
        it = agent(lossy=lossy)
        it._waits_for, it.lags = "t1", lags
        assert it.waits_for == waits_for
