"""Golden scenarios: what clients hear and the store holds when things break, as documentation.

To accept other outputs: ``SESSILE_REWRITE_GOLDEN=1 pytest tests/sim/test_scenarios.py``, and read
the difference before it is committed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from loadtest.simulation.scenario import parse, play, render

pytestmark = pytest.mark.timeout(30)
FOLDER = Path(__file__).parent / "scenarios"
SCENARIOS = sorted(FOLDER.glob("*.txt"))


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
