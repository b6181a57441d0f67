"""Checkers that find nothing prove nothing: rules are broken on purpose, and must be noticed.

``make mutants`` hunts the whole catalogue; here it is kept applicable, and a few are hunted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loadtest.simulation.history import HistoryPlan
from tests.sim.mutants.catalogue import MUTANTS
from tests.sim.mutants.mutant import ROOT, Edit, Mutant, hunt, unmutated

QUICK = (
    "an append whose reply was lost is applied twice",
    "epochs stand still",
    "tokens are delivered before they are journalled",
    "a moved stream starts over",
    "pages are used whatever their checksum",
    "a relay that joins messages drops the first",
)
"""Caught in the first histories."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_is_the_present_code_but_for_its_edits(mutant: Mutant, tmp_path: Path) -> None:
    for path in {edit.path for edit in mutant.edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for edit in mutant.edits:
        edit.apply(tmp_path)
    for path in {edit.path for edit in mutant.edits}:
        assert (tmp_path / path).read_text() != (ROOT / path).read_text()
        if path.endswith(".py"):
            compile((tmp_path / path).read_text(), path, "exec")


def test_an_edit_of_code_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    for before in (" = 1", "c"):
        with pytest.raises(ValueError, match="times"):
            Edit("code.py", before, "").apply(tmp_path)


def test_every_rule_is_broken_by_a_mutant_of_its_own_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    rules = {mutant.rule for mutant in MUTANTS}
    every = {f"P{number}" for number in range(1, 21)} | {f"I{number}" for number in range(1, 11)}
    assert rules == every


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", QUICK)
def test_a_broken_rule_is_found(name: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    found = hunt(mutant)
    assert found.checker, found


@pytest.mark.timeout(60)
def test_the_code_as_it_is_breaks_none() -> None:
    found = unmutated(HistoryPlan(kinds=("kill_replica",)), 3)
    assert (found.checker, found.detail, found.histories) == ("", "", 3)
