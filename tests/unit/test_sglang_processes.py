"""How the end of sglang's processes is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event

import anyio
import pytest

from workers.engines.sglang.processes import Processes

pytestmark = pytest.mark.anyio

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def processes() -> Iterator[Processes]:
    it = Processes()
    yield it
    it.end(5.0, asked=False)


def run(go: Event) -> SpawnProcess:
    """A process that ends with 0 when it is told."""
    return _running(_wait, go)


def _running(target: Callable[..., None], *events: Event) -> SpawnProcess:
    """On return it runs ``target``: one that still starts would not find an event that its caller
    drops meanwhile."""
    ready = SPAWN.Event()
    process = SPAWN.Process(target=target, args=(ready, *events))
    process.start()
    assert ready.wait(30)
    return process


def _wait(ready: Event, go: Event) -> None:
    ready.set()
    go.wait()


def _stay(ready: Event) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    while True:
        signal.pause()


class Ends:
    """What was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._one = anyio.Event()

    def __call__(self, detail: str) -> None:
        self.told.append(detail)
        self._one.set()

    async def one(self) -> str:
        with anyio.fail_after(10):
            await self._one.wait()
        await anyio.wait_all_tasks_blocked()
        (detail,) = self.told
        return detail


async def test_an_end_with_0_is_an_end(processes: Processes) -> None:
    """So ends a scheduler that has caught an exception."""
    go = SPAWN.Event()
    run(go)
    run(SPAWN.Event())
    ends = Ends()
    processes.watch(ends)
    go.set()
    assert await ends.one() == "a process of sglang ended with 0; restart the replica"


async def test_a_killed_one_is_told_once(processes: Processes) -> None:
    children = [run(SPAWN.Event()) for _ in range(2)]
    ends = Ends()
    processes.watch(ends)
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    assert "ended with -9" in await ends.one()


async def test_what_was_there_before_is_none_of_them() -> None:
    go = SPAWN.Event()
    other = run(go)
    processes = Processes()
    ends = Ends()
    processes.watch(ends)
    processes.end(5.0, asked=True)
    assert other.is_alive()
    go.set()
    await anyio.to_thread.run_sync(other.join)
    await anyio.wait_all_tasks_blocked()
    assert ends.told == []


async def test_what_another_engine_starts_later_is_none_of_them() -> None:
    processes = Processes()
    run(SPAWN.Event())
    processes.watch(Ends())
    go = SPAWN.Event()
    other = run(go)
    processes.unwatch()
    processes.end(5.0, asked=False)
    assert processes.started() == []
    assert other.is_alive()
    go.set()
    await anyio.to_thread.run_sync(other.join)


async def test_an_end_that_was_asked_for_is_not_told(processes: Processes) -> None:
    go = SPAWN.Event()
    child = run(go)
    ends = Ends()
    processes.watch(ends)
    processes.unwatch()
    go.set()
    await anyio.to_thread.run_sync(child.join)
    await anyio.wait_all_tasks_blocked()
    assert ends.told == []


async def test_what_does_not_end_is_killed(processes: Processes) -> None:
    child = _running(_stay)
    await anyio.to_thread.run_sync(lambda: processes.end(0.4, asked=True))
    assert child.exitcode == -signal.SIGKILL
    assert processes.started() == []
