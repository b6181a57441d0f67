"""Hunts one mutant: runs histories on the code that PYTHONPATH names. Prints one line of JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import sessile

import gateway
import loadtest
import statestore
import workers
from loadtest.simulation.history import HistoryPlan, simulate

FIRST_SEED = 7000
CHECKER = re.compile(r"\b([IP]\d{1,2}):")
"""How a checker names itself in a violation."""


def check_home(root: str) -> None:
    """Raises SystemExit if any package is not that of ``root``."""
    home = Path(root).resolve()
    for package in (gateway, loadtest, sessile, statestore, workers):
        if home not in Path(str(package.__file__)).resolve().parents:
            raise SystemExit(f"{package.__name__} is {package.__file__}, not in {home}")


def hunt(plan: HistoryPlan, seeds: int) -> dict[str, object]:
    """Runs histories until a named checker is violated; the fields of ``mutant.Hunt``."""
    started, seen = time.monotonic(), ""
    checker, seed = "", FIRST_SEED
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        try:
            violations = simulate(seed, plan).violations
        except Exception as error:  # noqa: BLE001 - counted as what it is: no checker's work
            seen = seen or f"seed {seed} crashed: {error!r}"
            continue
        named = [(match[1], v) for v in violations if (match := CHECKER.search(v))]
        if named:
            checker, seen = named[0]
            break
        if violations:
            seen = seen or f"seed {seed}, without a name: {violations[0]}"
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
    return hunt(HistoryPlan(**order["plan"]), order["seeds"])


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print(json.dumps(main(json.loads(sys.argv[1]))))
