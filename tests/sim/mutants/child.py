"""Hunts one mutant: runs histories on the code that PYTHONPATH names. Prints one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sessile

import gateway
import loadtest
import statestore
import workers
from loadtest.simulation.history import HistoryPlan, simulate

FIRST_SEED = 7000


def check_home(root: str) -> None:
    """Raises SystemExit if any package is not that of ``root``."""
    home = Path(root).resolve()
    for package in (gateway, loadtest, sessile, statestore, workers):
        if home not in Path(str(package.__file__)).resolve().parents:
            raise SystemExit(f"{package.__name__} is {package.__file__}, not in {home}")


def hunt(plan: HistoryPlan, seeds: int, rules: Sequence[str]) -> dict[str, object]:
    """Runs histories until a checker of one of these rules (of any, if there are none) is violated;
    the fields of ``mutant.Hunt``."""
    started, seen = time.monotonic(), ""
    checker, seed = "", FIRST_SEED
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        report = simulate(seed, plan)
        counts = [(rule, what) for rule, what in report.named if rule in rules or not rules]
        if counts:
            checker, seen = counts[0]
            break
        if report.violations:
            seen = seen or f"seed {seed}, not counted: {report.violations[0]}"
    return {
        "checker": checker,
        "seed": seed,
        "histories": seed - FIRST_SEED + 1,
        "seconds": round(time.monotonic() - started, 1),
        "detail": seen[:500],
    }


def main(order: dict[str, Any]) -> dict[str, object]:
    check_home(order["root"])
    order["plan"]["kinds"] = tuple(order["plan"]["kinds"])
    return hunt(HistoryPlan(**order["plan"]), order["seeds"], order["rules"])


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print(json.dumps(main(json.loads(sys.argv[1]))))
