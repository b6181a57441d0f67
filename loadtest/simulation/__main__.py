"""Runs seeded histories; exits non-zero if one breaks a rule.

python -m loadtest.simulation --seeds 0:500 --jobs 2 [--kinds drain,migrate] [--json FILE]
python -m loadtest.simulation --minutes 60 [--first 20260101000000] …

The second form runs as many histories as it begins in that time; each day has seeds of its own,
unless told where they begin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from loadtest.simulation.coverage import RARE, UNREACHABLE, everything, missing
from loadtest.simulation.faults import FAULTS
from loadtest.simulation.history import HistoryPlan
from loadtest.simulation.sweep import Sweep, sweep

SEEDS_OF_A_DAY = 1_000_000


def main() -> int:
    """Returns the exit code."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.first is not None and chosen.minutes is None:
        parser.error("--first goes with --minutes; --seeds says itself where it begins")
    console, limited = Console(), chosen.minutes is not None
    first = _of_today() if chosen.first is None else chosen.first
    seeds = itertools.count(first) if limited else chosen.seeds
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("histories", total=None if limited else len(chosen.seeds))
        done = sweep(
            seeds,
            HistoryPlan(kinds=chosen.kinds),
            chosen.jobs,
            lambda: bar.advance(task),
            within_s=60.0 * chosen.minutes if limited else math.inf,
        )
    _show(console, done)
    if limited:
        console.print(f"seeds {first}:{first + done.histories}", highlight=False)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(done.figures(), indent=2) + "\n")
    return 1 if done.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=_seeds, default=range(200), help="first:end, or one seed")
    which.add_argument("--minutes", type=_minutes, help="as many histories as begin in this time")
    parser.add_argument("--first", type=int, help="with --minutes: first seed; default: the date's")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--kinds", type=_kinds, default=(), help="comma-separated; default: drawn")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def _show(console: Console, done: Sweep) -> None:
    table = Table(
        "transition or row of the failure table", "seen", "why not, or not often", title="coverage"
    )
    for name in everything():
        note = UNREACHABLE.get(name) or RARE.get(name, "")
        table.add_row(name, str(done.coverage[name]), note)
    console.print(table)
    for seed, explanation in done.failures.items():
        console.rule(f"[red]seed {seed}")
        console.print(explanation, markup=False, highlight=False)
    unseen = len(missing(done.coverage))
    console.print(
        f"{done.histories} histories, {done.turns} turns, {done.faults} faults,"
        f" {done.verified_pages} KV pages verified, {unseen} transitions and rows not"
        f" seen that should be, {len(done.failures)} failures",
        highlight=False,
    )


def _of_today() -> int:
    """The first seed of this day; the next day's are a million further on."""
    return int(f"{datetime.now(UTC):%Y%m%d}") * SEEDS_OF_A_DAY


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError("a time above 0 is needed")
    return minutes


def _seeds(text: str) -> range:
    first, colon, end = text.partition(":")
    seeds = range(int(first), int(end)) if colon else range(int(first), int(first) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError("no seed is in this range")
    return seeds


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {', '.join(FAULTS)}")
    return kinds


if __name__ == "__main__":
    raise SystemExit(main())
