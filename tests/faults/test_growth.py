"""A soak fails on memory that grows too much, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.growth import MIB, Sample, too_much

SAMPLES = 100
TURNS = 40
"""Between two samples."""
Size = Callable[[int], int]
"""Bytes by number of turns."""


def _level(_: int) -> int:
    return 60 * MIB


def run(
    worker: Size = _level,
    gateway: Size = _level,
    session: Size = lambda turns: 5000 + 2000 * turns,
    keys: Size = lambda turns: 3 * turns // 4,
) -> list[Sample]:
    return [
        Sample(
            at_s=6.0 * i,
            rss={"w1 (7)": worker(TURNS * i), "g1 (8)": gateway(TURNS * i)},
            store_bytes=2000 * TURNS * i,
            store_keys=keys(TURNS * i),
            sessions_opened=TURNS * i // 4,
            turns=TURNS * i,
            session_bytes={"ses_a": [i, session(i)]},
        )
        for i in range(SAMPLES)
    ]


def test_memory_that_levels_off_is_no_complaint() -> None:
    assert too_much(run()) == []
    rises_to_a_plateau: Size = lambda turns: (60 + min(12, turns // 200)) * MIB  # noqa: E731
    assert too_much(run(worker=rises_to_a_plateau)) == []


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (run(worker=lambda turns: 60 * MIB + 8000 * turns), "w1 (7) grew by"),
        (run(gateway=lambda turns: 60 * MIB + 4000 * turns), "g1 (8) grew by"),
        (run(session=lambda turns: 5000 * turns), "ses_a takes 5000 bytes a turn"),
        (run(session=lambda turns: 25 * turns * turns), "ses_a grew by"),
        (run(keys=lambda turns: 2 * turns), "keys of"),
        (run()[:5], "growth cannot be judged"),
    ],
)
def test_what_grows_without_a_bound_is_named(samples: list[Sample], complaint: str) -> None:
    found = too_much(samples)
    assert len(found) == 1, found
    assert complaint in found[0]


def test_processes_that_were_replaced_cannot_be_judged() -> None:
    samples = run()
    for index, sample in enumerate(samples):
        sample.rss = {f"{name} {index}": size for name, size in sample.rss.items()}
    assert too_much(samples) == ["no gateway or worker lived all the time: growth cannot be judged"]
