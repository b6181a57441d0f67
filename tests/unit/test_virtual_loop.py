"""AnyIO programs on the virtual-time loop: time, order, and the two ways to get stuck."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import anyio
import pytest
from anyio.streams.memory import MemoryObjectSendStream

from loadtest.simulation.loop import (
    Deadlock,
    Livelock,
    Process,
    SimulationError,
    Step,
    VirtualClock,
    current_process,
    run,
    true_time,
)


async def busy_program() -> list[str]:
    """Groups, scopes, events, streams, time limits: everything whose order could vary."""
    log: list[str] = []
    clock = VirtualClock()
    send, receive = anyio.create_memory_object_stream[str](2)
    event = anyio.Event()

    async def sleeper(name: str) -> None:
        try:
            await event.wait()
            await clock.sleep(1.0)
        except anyio.get_cancelled_exc_class():
            log.append(f"{clock.now():.3f} {name} cancelled")
            raise

    async def producer(name: str, stream: MemoryObjectSendStream[str]) -> None:
        async with stream:
            for i in range(3):
                await stream.send(f"{name}{i}")
                await clock.sleep(0.25)

    async def consumer() -> None:
        async with receive:
            while True:
                try:
                    log.append(f"{clock.now():.3f} got {await receive.receive()}")
                except anyio.EndOfStream:
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(consumer)
        for i in range(4):
            group.start_soon(producer, f"p{i}-", send.clone())
        send.close()
        with anyio.move_on_after(0.6) as scope:
            async with anyio.create_task_group() as inner:
                for i in range(30):
                    inner.start_soon(sleeper, f"s{i}")
        assert scope.cancelled_caught
        event.set()
        with pytest.raises(TimeoutError):
            with anyio.fail_after(5):
                await anyio.sleep_forever()
    log.append(f"end {clock.now():.3f}")
    return log


def traced(seed: int | None) -> list[str]:
    steps: list[Step] = []
    log = run(busy_program, seed, trace=steps.append)
    return [*log, *(f"{s.time:.6f} {s.task_number} {s.task_name}" for s in steps)]


def test_time_jumps_and_the_program_runs() -> None:
    log = run(busy_program, 1)
    assert log[-1] == "end 5.600"
    assert sum("cancelled" in line for line in log) == 30
    assert sum("got" in line for line in log) == 12


def test_a_seed_decides_the_schedule() -> None:
    assert traced(7) == traced(7)
    assert traced(7) != traced(8)
    assert traced(None) == traced(None)


def test_runs_do_not_depend_on_hashing_or_addresses() -> None:
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    program += "import test_virtual_loop as t; print('\\n'.join(t.traced(3)))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(traced(3))


def test_waiting_for_nothing_is_a_deadlock_that_names_the_waiters() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.Event().wait, name="forgotten")

    with pytest.raises(Deadlock, match="forgotten"):
        run(main, 1)


def test_spinning_without_time_is_a_livelock() -> None:
    async def main() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    with pytest.raises(Livelock):
        run(main, 1)


def test_shielded_cleanup_lets_time_pass() -> None:
    async def careful() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3600)

    async def main() -> float:
        async with anyio.create_task_group() as group:
            group.start_soon(careful)
            group.start_soon(careful)
            await anyio.sleep(1)
            group.cancel_scope.cancel()
        return anyio.current_time()

    assert run(main, 1) == 3601


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(SimulationError, match="thread"):
        run(main, 1)


def test_what_still_runs_at_the_end_is_cancelled() -> None:
    ended: list[str] = []

    async def main() -> None:
        async def left_over() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("cleaned up")

        asyncio.get_running_loop().create_task(left_over())
        await anyio.sleep(1)
        raise ValueError("main failed")

    with pytest.raises(ValueError, match="main failed"):
        run(main, 1)
    assert ended == ["cleaned up"]


def test_a_failing_callback_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
        await anyio.sleep(2)

    with pytest.raises(SimulationError, match="callback") as caught:
        run(main, 1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_stopped_process_executes_nothing_until_it_goes_on() -> None:
    async def main() -> list[str]:
        log: list[str] = []
        process = Process("p")
        asked = anyio.Event()

        async def ticker() -> None:
            assert current_process() is process
            try:
                while True:
                    await anyio.sleep(1)
                    log.append(f"{anyio.current_time():.1f} tick")
            finally:
                log.append("cleaned up")

        async def waiter() -> None:
            await asked.wait()
            log.append(f"{anyio.current_time():.1f} heard")

        async with anyio.create_task_group() as group:
            process.run(group.start_soon, ticker)
            process.run(group.start_soon, waiter)
            await anyio.sleep(2.5)
            process.stop()
            asked.set()
            group.cancel_scope.deadline = 12
            await anyio.sleep(3)
            process.resume()
            await anyio.sleep(1.2)
            process.stop()
            await anyio.sleep(5)
            assert current_process() is None
            log.append("woken")
            process.resume()
            await anyio.sleep_forever()
        return log

    assert run(main, 1) == [
        "1.0 tick", "2.0 tick", "5.5 heard", "5.5 tick", "6.5 tick", "woken", "11.7 tick",
        "cleaned up",
    ]  # fmt: skip


def test_each_process_has_a_clock_that_may_go_fast_and_jump() -> None:
    async def main() -> list[float]:
        process, woken = Process("p"), []

        async def sleeper(seconds: float) -> None:
            await anyio.sleep(seconds)
            woken.append(round(true_time(), 6))

        async with anyio.create_task_group() as tasks:
            process.run(process.set_clock, 2.0)
            process.run(tasks.start_soon, sleeper, 10.0)
            process.run(tasks.start_soon, sleeper, 30.0)
            tasks.start_soon(sleeper, 3.0)
            await anyio.sleep(1.0)
            assert process.run(anyio.current_time) == pytest.approx(2.0)
            process.set_clock(1.0, jump_s=6.0)  # reads 8 at 1
        return woken

    assert run(main) == [3.0, 3.0, 23.0]
