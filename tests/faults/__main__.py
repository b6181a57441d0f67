"""``make faults``: every class of fault on real processes, judged by the simulation's checkers."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table

from tests.faults.catalogue import CLASSES, CLOCKS, FLEETS
from tests.faults.fleet import Fleet, faketime
from tests.faults.remains import what_is_left
from tests.faults.rounds import FaultClass, Outcome, play


async def run_classes(
    chosen: list[FaultClass], numbers: range, seed: str, console: Console
) -> tuple[list[Outcome], list[str]]:
    """Plays every class, on one fleet per kind of store as long as it lasts; (outcomes, what was
    left at the end)."""
    outcomes: list[Outcome] = []
    left: list[str] = []
    for store in dict.fromkeys(cls.store for cls in chosen):
        waiting = deque((cls, index) for cls in chosen if cls.store == store for index in numbers)
        while waiting:
            async with FLEETS[store]() as running:
                await _play_on(running, waiting, seed, outcomes, console)
                if not outcomes[-1].fleet_lost:
                    left += [f"{store}: {what}" for what in await what_is_left(running)]
            left += [f"{store}: {what}" for what in running.complaints()]
    return outcomes, left


async def _play_on(
    running: Fleet,
    waiting: deque[tuple[FaultClass, int]],
    seed: str,
    outcomes: list[Outcome],
    console: Console,
) -> None:
    """Plays what is waiting, as long as this fleet can be brought back."""
    while waiting:
        cls, index = waiting.popleft()
        outcome = await play(running, cls, index, seed)
        outcomes.append(outcome)
        _say(console, outcome)
        if outcome.fleet_lost:
            return


def _say(console: Console, outcome: Outcome) -> None:
    word = "[red]FAILED[/red]" if outcome.failed else "ok"
    console.print(
        f"{outcome.name} {outcome.index}: {word} in {outcome.seconds:.1f} s,"
        f" {outcome.tally.turns} turns, worst gap {outcome.tally.worst_gap_s:.2f} s",
        highlight=False,
    )
    if outcome.failed:
        for line in [outcome.unproven, *outcome.proofs, *outcome.tally.violations]:
            console.print(f"    {line}", markup=False, highlight=False)


def table_of(outcomes: list[Outcome]) -> Table:
    table = Table(title="Real faults on real processes")
    heads = ("class", "faults", "phase proven", "turns", "tokens", "lost", "repeated", "hung",
             "violations", "told of loss", "worst gap, s")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "class" else "right")
    for name in dict.fromkeys(o.name for o in outcomes):
        mine = [o for o in outcomes if o.name == name]
        table.add_row(
            name,
            str(len(mine)),
            str(sum(not o.unproven for o in mine)),
            *(str(sum(getattr(o.tally, key) for o in mine))
              for key in ("turns", "tokens", "lost", "repeated", "hung")),
            str(sum(len(o.tally.violations) for o in mine)),
            str(sum(o.losses for o in mine)),
            f"{max(o.tally.worst_gap_s for o in mine):.2f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Exit code 1 if anything was violated, left behind, or not proven."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--classes", default="", help="comma-separated parts of class names")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of each class's first fault")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--report", type=Path, default=Path(".cache/faults-report.json"))
    parser.add_argument("--list", action="store_true", help="only list the classes")
    options = parser.parse_args()
    parts = [part for part in options.classes.split(",") if part]
    chosen = [c for c in CLASSES if not parts or any(part in c.name for part in parts)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.list or not chosen:
        for cls in CLASSES:
            console.print(f"{cls.name} (store: {cls.store})", highlight=False)
        return 0 if options.list else 2
    if faketime() is None and any(cls.store == CLOCKS for cls in chosen):
        console.print("clocks cannot be set: install libfaketime (Debian package faketime)")
        return 2
    logging.basicConfig(level=logging.WARNING)
    started = time.monotonic()
    numbers = range(options.first, options.first + options.per_class)
    outcomes, left = anyio.run(
        run_classes, chosen, numbers, options.seed, console, backend_options={"use_uvloop": True}
    )
    seconds = time.monotonic() - started
    console.print(table_of(outcomes))
    failed = [o for o in outcomes if o.failed]
    for what in left:
        console.print(f"left behind: {what}", style="red")
    console.print(
        f"{len(outcomes)} faults in {seconds:.0f} s, {len(failed)} rounds failed,"
        f" seed {options.seed}"
    )
    report = {
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "faults": len(outcomes),
        "left_behind": left,
        "rounds": [asdict(o) for o in outcomes],
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1))
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
