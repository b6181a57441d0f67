"""Deliberate bugs: what they are, and how one is applied to a copy of the code and hunted.

A mutant is a small edit of the real code that breaks one rule. It is *caught* if in a history of
the simulation a checker is violated that stands for this rule, or for one that the mutant names
beside it. A mutant that does not import is a broken mutant; a crash, or a violation without a name,
catches nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtest.simulation.history import HistoryPlan

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("gateway", "workers", "statestore", "loadtest", "sdk/sessile")
CHILD = Path(__file__).with_name("child.py")
CHILD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Edit:
    """``before`` occurs exactly once in ``path`` (from the top of the repository)."""

    path: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Writes the edited file; raises ValueError if the code is written in another way now."""
        file = root / self.path
        text = file.read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.path}: {text.count(self.before)} times: {self.before!r}")
        file.write_text(text.replace(self.before, self.after))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One deliberate bug, which must be caught in ``seeds`` histories of ``plan``."""

    name: str
    """What goes wrong."""
    rule: str
    """P1 to P20, or I1 to I10 where no protocol rule stands for it."""
    edits: tuple[Edit, ...]
    plan: HistoryPlan
    seeds: int = 15
    also: tuple[str, ...] = ()
    """Rules under whose names it shows, where its own has no checker that could tell."""


@dataclass(frozen=True, slots=True)
class Hunt:
    """How the hunt for a mutant ended. ``checker`` names what caught it; empty: it survived."""

    checker: str
    seed: int
    histories: int
    seconds: float
    detail: str
    """The violation; of a survivor, what was seen that does not count."""


class BrokenMutant(Exception):
    """The mutated code does not run at all, or never ends."""


def hunt(mutant: Mutant) -> Hunt:
    """Runs the mutant's histories on a mutated copy of the code until one is violated. Raises
    ValueError for an edit that does not apply, BrokenMutant for code that does not run."""
    with tempfile.TemporaryDirectory(prefix="sessile-mutant-") as scratch:
        copy = Path(scratch)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package)
        for edit in mutant.edits:
            edit.apply(copy)
        return _run(mutant.plan, mutant.seeds, copy, (mutant.rule, *mutant.also))


def unmutated(plan: HistoryPlan, seeds: int) -> Hunt:
    """The same histories on the code as it is: they must find nothing at all."""
    return _run(plan, seeds, ROOT)


def _run(plan: HistoryPlan, seeds: int, root: Path, rules: tuple[str, ...] = ()) -> Hunt:
    order = {"root": str(root), "seeds": seeds, "plan": asdict(plan), "rules": rules}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "sdk")]),
        "PYTHONHASHSEED": "0",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(order)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenMutant(f"no end within {CHILD_TIMEOUT_S} s") from error
    if done.returncode:
        raise BrokenMutant(done.stderr[-3000:])
    return Hunt(**json.loads(done.stdout.splitlines()[-1]))
