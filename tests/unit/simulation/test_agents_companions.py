"""Whoever asks beside a session's client is heard by the checkers too."""

from __future__ import annotations

from typing import Any

from gateway.core.errors import SessionClosed
from loadtest.simulation.clients import companions
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.loop import run
from tests.unit.simulation.small_world import asked, lone


class Deaf(Agent):
    """Each of its streams is wrong, and refuses the turn."""

    async def listen(self, heard: TurnHeard, **how: Any) -> None:
        heard.violations.append("I2: tokens at 3, not 2")
        heard.error = SessionClosed("it is closed")


def deaf() -> Deaf:
    return lone(Deaf, lossy=True)


def test_a_late_repeat_is_judged_too() -> None:
    agent = deaf()

    async def repeat() -> None:
        await companions.repeat_late(agent, TurnHeard("ses_a", "t0", asked("t0", "x")))

    run(repeat, 1, None)
    assert [it.violations for it in agent.others] == [["I2: tokens at 3, not 2"]] * 3


def test_nobody_repeats_for_a_client_that_does_not_come_back() -> None:
    agent = deaf()
    agent.vanished = True

    async def repeat() -> None:
        await companions.repeat_late(agent, TurnHeard("ses_a", "t0", asked("t0", "x")))

    run(repeat, 1, None)
    assert agent.others == []


def test_a_second_listener_and_a_second_turn_are_judged_too() -> None:
    agent = deaf()

    async def ask() -> None:
        await companions.listen_too(agent, TurnHeard("ses_a", "t0", asked("t0", "x")), 100.0)
        await companions.ask_twice(agent, "t0b")

    run(ask, 1, None)
    assert [(it.turn_id, len(it.violations)) for it in agent.others] == [("t0", 1), ("t0b", 1)]


def test_what_is_wrong_with_a_refusal_is_told() -> None:
    agent = deaf()

    async def ask() -> None:
        await agent.be_refused(SessionClosed)

    run(ask, 1, None)
    assert agent.violations == ["I2: tokens at 3, not 2"]
