"""Which histories a sweep runs."""

from __future__ import annotations

import itertools

import pytest

from loadtest.simulation.__main__ import _parser
from loadtest.simulation.history import HistoryPlan
from loadtest.simulation.sweep import BATCH, sweep

SMALL = HistoryPlan(replicas=1, gateways=1, agents=1, turns=1, storm_s=0.1, kinds=("evict",))


@pytest.mark.timeout(120)
def test_a_sweep_begins_no_history_once_its_time_is_over() -> None:
    times = iter((0.0, 59.0, 60.0))
    done = sweep(itertools.count(5), SMALL, within_s=60.0, clock=lambda: next(times))
    assert done.histories == BATCH
    assert not done.failures


@pytest.mark.timeout(120)
def test_a_sweep_of_given_seeds_runs_them_all() -> None:
    assert sweep(range(BATCH + 1), SMALL).histories == BATCH + 1


@pytest.mark.parametrize(
    "arguments", [["--seeds", "5:5"], ["--seeds", "0:5", "--minutes", "1"], ["--minutes", "0"]]
)
def test_arguments_that_name_no_history_or_two_sets_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(arguments)
