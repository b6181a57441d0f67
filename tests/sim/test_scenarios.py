"""Golden scenarios: what clients hear and the store holds when things break, as documentation.

To accept other outputs: ``SESSILE_REWRITE_GOLDEN=1 pytest tests/sim/test_scenarios.py``, and read
the difference before it is committed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from loadtest.simulation import coverage
from loadtest.simulation.scenario import parse, play, player, render
from loadtest.simulation.scenario.watch import Watch
from loadtest.simulation.world import World

pytestmark = pytest.mark.timeout(30)
FOLDER = Path(__file__).parent / "scenarios"
SCENARIOS = sorted(FOLDER.glob("*.txt"))
RARE = {
    "turn: RUNNING -RESUME-> RUNNING": "engine_is_slow",
    "turn: INTERRUPTED -CANCEL-> CANCELLED": "cancel_between_owners",
    "turn: INTERRUPTED -FAIL-> FAILED": "poison",
    "replica: READY -EXPIRED-> DOWN": "heartbeats_read_seldom",
    "replica: DOWN -DRAIN-> DOWN": "drained_and_dead",
    "migration: SWITCHING -BEHIND-> COPYING": "switch_comes_late",
    "migration: SWITCHING -FAIL-> ABORTED": "switch_comes_late",
}
"""Transition that the standard histories are not asked for -> the scenario that has it."""


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_a_scenario_goes_as_written(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    written = path.read_text()
    blocks = parse(written)
    played = render(blocks, play(blocks))
    if os.environ.get("SESSILE_REWRITE_GOLDEN"):
        path.write_text(played)
    else:
        assert played == written


def test_every_rare_transition_has_its_scenario() -> None:
    assert RARE.keys() == coverage.RARE.keys()


@pytest.mark.parametrize(("transition", "scenario"), RARE.items())
def test_a_scenario_reaches_what_histories_seldom_do(
    transition: str, scenario: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    seen: Counter[str] = Counter()

    def watch(built: World) -> Watch:
        counting = Watch(built)
        counting.tally.seen = seen
        return counting

    with coverage.counted(seen), mock.patch.object(player, "Watch", watch):
        play(parse((FOLDER / f"{scenario}.txt").read_text()))
    assert seen[transition]
