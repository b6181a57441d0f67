"""Runs seeded histories; exits non-zero if one breaks a rule.

python -m loadtest.simulation --seeds 0:500 --jobs 2 [--kinds drain,migrate] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from loadtest.simulation.coverage import RARE, UNREACHABLE, everything, missing
from loadtest.simulation.faults import FAULTS
from loadtest.simulation.history import HistoryPlan
from loadtest.simulation.sweep import Sweep, sweep


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulation")
    parser.add_argument("--seeds", type=_seeds, default=range(200), help="first:end, or one seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--kinds", type=_kinds, default=(), help="comma-separated; default: drawn")
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    console = Console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("histories", total=len(chosen.seeds))
        done = sweep(
            chosen.seeds,
            HistoryPlan(kinds=chosen.kinds),
            chosen.jobs,
            lambda: bar.advance(task),
        )
    _show(console, done)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(done.figures(), indent=2) + "\n")
    return 1 if done.failures else 0


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
