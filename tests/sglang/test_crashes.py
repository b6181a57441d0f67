"""The ends that sglang's processes come to, and what is left of what is cancelled at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import anyio
import psutil
import pytest

from tests.sglang.engines import SglangHarness
from tests.sglang.test_engine import running, sglang_processes
from workers.engines.port import EngineFailed

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What asks this process for an end is not told to engines of other tests."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGQUIT, before)


async def failure_of(it: SglangHarness) -> str:
    """Why the engine failed; it takes nothing more."""
    with anyio.fail_after(20):
        while not it.failures:
            await anyio.lowlevel.checkpoint()
    with pytest.raises(EngineFailed):
        it.request(it.prompt(2, 9), 4)
    (failure,) = it.failures
    it.failures.clear()
    return str(failure)


async def start_one(it: SglangHarness) -> None:
    going = it.request(it.prompt(1, 40), 400)
    await it.until(going, 1)


def scheduler_beside(others: set[psutil.Process]) -> psutil.Process:
    mine = sglang_processes() - others
    return next(c for c in mine if "scheduler" in " ".join(c.cmdline()))


async def test_a_killed_scheduler_is_the_end_of_the_engine() -> None:
    others = sglang_processes()
    async with running() as it:
        await start_one(it)
        scheduler_beside(others).send_signal(signal.SIGKILL)
        assert "ended with -9" in await failure_of(it)


async def test_an_exception_in_a_scheduler_is_the_end_of_the_engine() -> None:
    """It ends with 0, after it has asked for an end."""
    async with running() as it:
        await start_one(it)
        runtime = it.engine._it.runtime
        assert runtime._own is not None
        socket = runtime._manager.send_to_scheduler
        runtime._own.call_soon_threadsafe(lambda: socket.send(b"\xc1"))  # no message of sglang's
        failure = await failure_of(it)
        assert "asks to be ended" in failure or "ended with 0" in failure


async def test_a_scheduler_that_hangs_is_the_end_of_the_engine() -> None:
    """Its watchdog asks for an end, and it stays."""
    others = sglang_processes()
    async with running() as it:
        await start_one(it)
        scheduler_beside(others).send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGQUIT)
        assert "asks to be ended" in await failure_of(it)


async def test_a_generation_cancelled_at_once_does_not_run_on() -> None:
    async with running() as it:
        for seed in range(3):
            it.engine.cancel(it.request(it.prompt(seed, 40), 1900))
        with anyio.fail_after(5):  # of the half minute that one takes
            while not await it.engine.flush():  # it cannot while requests run
                await anyio.lowlevel.checkpoint()
        assert (await it.generate(it.prompt(9, 9), 4)).error is None
