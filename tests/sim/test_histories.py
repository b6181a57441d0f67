"""Seeded histories of a whole Sessile under faults. A failure prints its seed and what happened:

python -c "from loadtest.simulation.history import simulate; print(simulate(SEED).explain())"
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys

import pytest

from loadtest.simulation.history import HistoryPlan, simulate
from loadtest.simulation.loop import Step

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Faults are logged by those whom they hit; a failing history explains itself."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("seed", range(40))
def test_a_history_keeps_every_invariant(seed: int) -> None:
    report = simulate(seed)
    assert not report.violations, report.explain()


@pytest.mark.parametrize("kind", ["kill_replica", "freeze_replica", "drain", "migrate"])
def test_moves_happen_and_turns_survive_them(kind: str) -> None:
    reports = [
        simulate(seed, HistoryPlan(kinds=(kind,), storm_s=8.0)) for seed in range(1000, 1003)
    ]
    for report in reports:
        assert not report.violations, report.explain()
        assert report.committed >= report.turns // 2
    assert sum(report.moves for report in reports) > 0


def test_sessions_fork_pause_and_end_in_histories() -> None:
    reports = [simulate(seed, HistoryPlan(kinds=("kill_replica",))) for seed in range(4000, 4006)]
    for report in reports:
        assert not report.violations, report.explain()
    for kind in ("forks", "suspensions", "closed", "purged"):
        assert sum(getattr(report, kind) for report in reports) > 1, kind


@pytest.mark.parametrize("seed", range(3000, 3010))
def test_lost_writes_are_repaired_by_the_owner(seed: int) -> None:
    """Acknowledged writes vanish while every owner lives: no client ever learns of it."""
    report = simulate(seed, HistoryPlan(kinds=("lose_writes",)))
    assert not report.violations, report.explain()
    assert report.losses == 0


@pytest.mark.parametrize("seed", [*range(9), 49])
def test_a_loss_without_its_owner_is_told_and_never_a_silent_fork(seed: int) -> None:
    # 49: a lost commit, the turn cancelled before the owner came back to repair it.
    kinds = ("lose_writes", "kill_replica", "freeze_replica", "migrate", "kill_gateway")
    report = simulate(seed, HistoryPlan(kinds=kinds))
    assert not report.violations, report.explain()


def trace_of(seed: int) -> str:
    """Digest of every step of a history."""
    digest = hashlib.blake2b(digest_size=16)

    def note(step: Step) -> None:
        digest.update(f"{step.time!r} {step.task_number} {step.task_name}\n".encode())

    simulate(seed, HistoryPlan(storm_s=4.0), note)
    return digest.hexdigest()


def test_a_history_is_a_function_of_its_seed() -> None:
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    program += "import test_histories as t; print(t.trace_of(5))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
