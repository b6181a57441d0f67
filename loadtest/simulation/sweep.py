"""Many histories, in several processes: those of given seeds, or as many as fit into a time."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loadtest.simulation.history import HistoryPlan, HistoryReport, simulate

MAX_EXPLAINED = 5
"""Failures of one sweep that are minimised and told in full; the others only by what they break."""

BATCH = 20
"""Histories of each process between two looks at the clock."""


@dataclass
class Sweep:
    """Figures of the histories so far."""

    histories: int = 0
    turns: int = 0
    faults: int = 0
    verified_pages: int = 0
    coverage: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    """Seed -> why."""

    def add(self, report: HistoryReport) -> None:
        """Counts a history."""
        self.histories += 1
        self.turns += report.turns
        self.faults += len(report.schedule)
        self.verified_pages += report.verified_pages
        self.coverage += report.coverage
        if report.violations:
            full = len(self.failures) < MAX_EXPLAINED
            self.failures[report.seed] = report.explain() if full else "\n".join(report.violations)

    def __iadd__(self, other: Sweep) -> Sweep:
        self.histories += other.histories
        self.turns += other.turns
        self.faults += other.faults
        self.verified_pages += other.verified_pages
        self.coverage += other.coverage
        self.failures |= other.failures
        return self

    def figures(self) -> dict[str, Any]:
        """For machines."""
        return {
            "histories": self.histories,
            "turns": self.turns,
            "faults": self.faults,
            "verified_pages": self.verified_pages,
            "coverage": dict(sorted(self.coverage.items())),
            "failures": self.failures,
        }


def sweep(
    seeds: Iterable[int],
    plan: HistoryPlan,
    jobs: int = 1,
    on_done: Callable[[], None] = lambda: None,
    *,
    within_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Sweep:
    """Runs the histories of these seeds, which may be without end: of those, as many as ``jobs``
    processes begin in ``within_s`` seconds. A history that crashes is a failure of its seed."""
    done, left, until = Sweep(), iter(seeds), clock() + within_s
    batch = None if within_s == math.inf else BATCH * jobs
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_be_quiet) as pool:
        while clock() < until and (some := [*itertools.islice(left, batch)]):
            for seed, report in pool.imap_unordered(partial(_run, plan), some, chunksize=1):
                if isinstance(report, HistoryReport):
                    done.add(report)
                else:
                    done.histories += 1
                    done.failures[seed] = report
                on_done()
    return done


def _be_quiet() -> None:
    """Faults are logged by those whom they hit; a failing history explains itself."""
    logging.disable(logging.CRITICAL)


def _run(plan: HistoryPlan, seed: int) -> tuple[int, HistoryReport | str]:
    try:
        return seed, simulate(seed, plan)
    except Exception:  # noqa: BLE001 - the others are to run; this one is told
        return seed, traceback.format_exc()
