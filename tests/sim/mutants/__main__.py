"""``make mutants``: applies every deliberate bug in turn and demands that the simulation finds it.

    python -m tests.sim.mutants [--only NAME] [--jobs 2] [--json FILE]

Exits non-zero if a mutant survives or does not run, or if the unmutated code is not clean in the
same histories.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.catalogue import MUTANTS
from tests.sim.mutants.mutant import BrokenMutant, Hunt, Mutant, hunt, unmutated


def attempt(run: Callable[[], Hunt]) -> Hunt | str:
    """The hunt, or what kept it from running."""
    try:
        return run()
    except (BrokenMutant, ValueError) as error:
        return str(error)


def clean_histories(mutants: Iterable[Mutant]) -> dict[HistoryPlan, int]:
    """The histories of all these mutants: plan to seeds."""
    seeds: dict[HistoryPlan, int] = {}
    for mutant in mutants:
        seeds[mutant.plan] = max(mutant.seeds, seeds.get(mutant.plan, 0))
    return seeds


def main() -> int:
    """Runs the hunts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description="see above")
    parser.add_argument("--only", action="append", default=[], help="part of a mutant's name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.only or any(o in m.name for o in chosen.only)]
    plans = clean_histories(mutants)
    console = Console()
    table = Table("rule", "mutant", "caught by", "histories", "seconds")
    results: list[Hunt | str] = []
    survivors = dirty = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        hunts = [pool.submit(attempt, partial(hunt, mutant)) for mutant in mutants]
        cleans = [pool.submit(attempt, partial(unmutated, *item)) for item in plans.items()]
        for mutant, one in zip(mutants, hunts, strict=True):
            result = one.result()
            results.append(result)
            if isinstance(result, Hunt) and result.checker:
                row = [result.checker, f"{result.histories} of {mutant.seeds}", str(result.seconds)]
            else:
                survivors += 1
                row = ["does not run" if isinstance(result, str) else "nothing", "", ""]
            console.print(f"{mutant.rule} {mutant.name}: {row[0]}", highlight=False)
            if not row[1]:
                console.print(result if isinstance(result, str) else result.detail, markup=False)
            table.add_row(mutant.rule, mutant.name, *row)
        for plan, one in zip(plans, cleans, strict=True):
            found = one.result()
            if isinstance(found, str) or found.checker or found.detail:
                dirty += 1
                console.print("the unmutated code is not clean in", plan, found)
    console.print(table)
    console.print(
        f"{len(mutants) - survivors} of {len(mutants)} mutants caught; "
        f"{sum(plans.values())} histories of the unmutated code, {dirty or 'no'} plan violated"
    )
    if chosen.json:
        rows = [
            {
                "rule": mutant.rule,
                "name": mutant.name,
                **(asdict(result) if isinstance(result, Hunt) else {"error": result}),
            }
            for mutant, result in zip(mutants, results, strict=True)
        ]
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if survivors or dirty else 0


if __name__ == "__main__":
    raise SystemExit(main())
