"""A process that a test has ended is told from one that ended by itself, or by somebody else."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults.children import Child

pytestmark = pytest.mark.anyio

OBEYS = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done"
FAILS_AT_THE_END = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done"
Start = Callable[[str], Child]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    made: list[Child] = []

    def starting(script: str) -> Child:
        made.append(Child("it", ["/bin/sh", "-c", script], tmp_path / "it.log"))
        return made[-1]

    yield starting
    for child in made:
        child.kill()
        await child.ended()


async def test_a_kill_by_the_test_is_no_end_of_its_own(start: Start) -> None:
    child = start(OBEYS)
    await child.ready()
    child.judge_its_end()
    child.kill()
    await child.ended()
    child.judge_its_end()
    assert child.complaints == []


async def test_a_kill_by_anybody_else_is_reported_once(start: Start) -> None:
    child = start(OBEYS)
    await child.ready()
    os.kill(child.pid, signal.SIGKILL)  # as the kernel does when memory runs out
    assert await child.ended() == -signal.SIGKILL
    child.judge_its_end()
    child.judge_its_end()
    assert [c.partition(":")[0] for c in child.complaints] == ["it ended by itself with -9"]


async def test_a_kill_that_comes_after_the_end_does_not_excuse_it(start: Start) -> None:
    child = start(OBEYS)
    await child.ready()
    os.kill(child.pid, signal.SIGKILL)
    await child.ended()
    child.kill()
    child.judge_its_end()
    assert len(child.complaints) == 1


@pytest.mark.parametrize(("script", "complaints"), [(OBEYS, 0), (FAILS_AT_THE_END, 1)])
async def test_after_sigterm_a_process_ends_with_0(
    start: Start, script: str, complaints: int
) -> None:
    child = start(script)
    await child.ready()
    await child.terminate()
    assert len(child.complaints) == complaints
