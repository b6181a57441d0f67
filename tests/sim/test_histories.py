"""Seeded histories of a whole Sessile under faults. A failure tells its seed, the faults that it
takes and what happened to the session; to run the same history again:

python -c "from loadtest.simulation.history import simulate; print(simulate(SEED).explain())"
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.simulation import coverage
from loadtest.simulation.coverage import Row
from loadtest.simulation.faults import FAULTS, LOSSY
from loadtest.simulation.history import HistoryPlan, kinds_of, simulate
from loadtest.simulation.loop import Step
from loadtest.simulation.schedule import Fault, minimise
from loadtest.simulation.sweep import sweep

STANDARD_SEEDS = range(300)
LOSS_KINDS = ("lose_writes", "lose_writes_and_owner", "freeze_replica", "migrate", "kill_gateway")
LOSS_SEEDS = range(5000, 5020)
"""Losses without their owner: told, and never a silent fork."""
LEAST_JUDGED = 5
"""Of each: clients of what the store has lost of a turn, or with a move."""
TRACED: tuple[tuple[int, tuple[str, ...]], ...] = (
    (5, ()),
    *((seed, tuple(sorted({*FAULTS} - LOSSY))[seed::4]) for seed in range(4)),
    (8, tuple(sorted(LOSSY))),
)
"""Seeds of the histories that are run twice, step by step, and which faults each has, one of each
kind; of none: those that are drawn from its seed."""
ONE_SEED = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Faults are logged by those whom they hit; a failing history explains itself."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_histories_keep_every_invariant_and_reach_every_transition() -> None:
    done = sweep(STANDARD_SEEDS, HistoryPlan(), jobs=2)
    done += sweep(LOSS_SEEDS, HistoryPlan(kinds=LOSS_KINDS), jobs=2)
    assert not done.failures, "\n\n".join(done.failures.values())
    assert done.histories == len(STANDARD_SEEDS) + len(LOSS_SEEDS)
    assert done.verified_pages > 50_000
    assert coverage.missing(done.coverage) == []
    for row in (Row.STORE_AND_OWNER, Row.STORE_LOSES_A_MOVE):
        assert done.coverage[row] >= LEAST_JUDGED, row
    unreachable = [name for name in coverage.UNREACHABLE if done.coverage[name]]
    assert unreachable == [], "these can be reached after all"


def test_every_kind_of_fault_is_in_the_standard_histories() -> None:
    assert {kind for seed in STANDARD_SEEDS for kind in kinds_of(seed)} == set(FAULTS)


@ONE_SEED
@pytest.mark.parametrize("kind", ["kill_replica", "freeze_replica", "drain", "migrate"])
def test_moves_happen_and_turns_survive_them(kind: str) -> None:
    reports = [
        simulate(seed, HistoryPlan(kinds=(kind,), storm_s=8.0)) for seed in range(1000, 1003)
    ]
    for report in reports:
        assert not report.violations, report.explain()
        assert report.committed >= report.turns // 2
    assert sum(report.moves for report in reports) > 0


@ONE_SEED
def test_sessions_fork_pause_and_end_in_histories() -> None:
    reports = [simulate(seed, HistoryPlan(kinds=("kill_replica",))) for seed in range(4000, 4006)]
    for report in reports:
        assert not report.violations, report.explain()
    for kind in ("forks", "suspensions", "closed", "purged"):
        assert sum(getattr(report, kind) for report in reports) > 1, kind


@ONE_SEED
@pytest.mark.parametrize("seed", range(3000, 3010))
def test_lost_writes_are_repaired_by_the_owner(seed: int) -> None:
    """Acknowledged writes vanish while every owner lives: no client ever learns of it."""
    report = simulate(seed, HistoryPlan(kinds=("lose_writes",)))
    assert not report.violations, report.explain()
    assert report.losses == 0


def traced_plan(kinds: tuple[str, ...]) -> HistoryPlan:
    schedule = tuple(Fault(1.2 + 0.4 * i, kind, seed=i) for i, kind in enumerate(kinds))
    return HistoryPlan(storm_s=4.0, kinds=kinds, schedule=schedule or None)


def trace_of(seed: int, kinds: tuple[str, ...]) -> str:
    """Digest of every step of a history."""
    digest = hashlib.blake2b(digest_size=16)

    def note(step: Step) -> None:
        digest.update(f"{step.time!r} {step.task_number} {step.task_name}\n".encode())

    simulate(seed, traced_plan(kinds), note)
    return digest.hexdigest()


@pytest.mark.timeout(200)
def test_a_history_is_a_function_of_its_seed() -> None:
    assert {kind for _, kinds in TRACED for kind in kinds} == {*FAULTS}
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    program += "import test_histories as t\nfor traced in t.TRACED: print(t.trace_of(*traced))"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
        )
        for hash_seed in ("1", "2")
    ]
    traces = [child.communicate(timeout=180)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert traces[0] == traces[1]
    assert len({*traces[0]}) == len(TRACED)


def test_a_schedule_is_minimised_to_the_faults_that_it_takes() -> None:
    schedule = [Fault(at_s=index, kind="evict", seed=index) for index in range(20)]
    culprits, tried = {schedule[3], schedule[11]}, []

    def fails(faults: Sequence[Fault]) -> bool:
        tried.append(faults)
        return culprits <= {*faults}

    assert minimise(schedule, fails, 100) == (schedule[3], schedule[11])
    assert len(tried) < 60
    assert {*minimise(schedule, fails, 5)} >= culprits


def test_a_fault_that_is_left_out_changes_no_other() -> None:
    first, second = Fault(0.5, "migrate", 7), Fault(1.0, "evict", 8)
    both, one = (
        simulate(3, HistoryPlan(kinds=("migrate", "evict"), schedule=schedule))
        for schedule in ((first, second), (second,))
    )
    assert both.schedule == (first, second)
    evicted = [
        [line.split(" evicts")[0][9:] for line in r.log if "evicts" in line] for r in (both, one)
    ]
    assert evicted[0] == evicted[1]
