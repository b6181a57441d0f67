"""The demo's live picture on a small terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from sessile import Replica, ReplicaLoad, ReplicaRef, ReplicaState

from loadtest.demo.agents import make_agents
from loadtest.demo.board import Board, Phase, TurnLog
from loadtest.demo.tasks import MODULES
from loadtest.demo.view import View


def replica(name: str) -> Replica:
    load = ReplicaLoad(4, 8, 0, 64, 0, 1234, 0, 3, 301.5, 12.0)
    return Replica(
        ref=ReplicaRef(name, 1),
        model="m",
        endpoint="127.0.0.1:1",
        state=ReplicaState.DRAINING,
        engine="torch",
        page_size=16,
        capacity_pages=16384,
        max_context_tokens=8192,
        load=load,
        site="",
        hardware="",
    )


@pytest.mark.anyio
async def test_a_terminal_of_80_by_24_shows_every_figure_and_the_last_events() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    view = View(console)
    view.replicas = [replica(f"r{number}") for number in range(1, 5)]
    view.board = board = Board(make_agents(MODULES[:8], 2), lambda event: None)
    for number, agent in enumerate(board.agents):
        agent.turns = [TurnLog(f"t{number}", 0.0, f"r{number % 4 + 1}", 0, 1800 + number)]
        agent.phase, agent.activity = Phase.RUNNING, "open_file(path='statistics.py') " * 5
    for number in range(30):
        board.say(f"event {number} " + "long " * 30)
    with console.capture() as captured:
        console.print(view._picture())
    lines = captured.get().splitlines()
    assert len(lines) <= 24
    shown = "\n".join(lines)
    assert "…" not in "".join(line.split("turn ")[0] for line in lines if "agent-" in line)
    for number in range(8):
        assert f"agent-{number + 1} " in shown
        assert f"{1800 + number} " in shown
    assert all(word in shown for word in ("draining", "1234/16384", "302", "running", "cached"))
    assert "event 29 " in shown
