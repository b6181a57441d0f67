"""An asyncio event loop in virtual time, whose runs are a function of their seed.

Time stands still while anything is ready and jumps to the next timer when nothing is, so a minute
of heartbeats costs microseconds and no test sleeps. There are no sockets and no threads.

The order in which ready tasks step is drawn from the seed: each seed is another legal schedule.
It must not depend on anything else, and AnyIO delivers a cancellation by iterating a *set* of
tasks, so the order in which tasks become ready varies with memory addresses. Hence ready tasks are
first sorted by spawn number and then shuffled; plain callbacks run before them, in FIFO order. The
cyclic garbage collector is off during a run, because what it finalises it finalises at arbitrary
moments.

A :class:`Process` is a group of tasks and timers that can be stopped and continued together, as by
SIGSTOP and SIGCONT: a stopped one executes nothing whatever, and a process that is never continued
has been killed, for no clean-up code of it has run. Each process has a monotonic clock of its own,
which may run slow or fast and jump forward: what it reads as the loop's time, and when its timers
are due, follows that clock. :func:`true_time` is nobody's clock.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import gc
import heapq
import itertools
import math
import random
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio

try:
    import sniffio
except ImportError:
    sniffio = None  # type: ignore[assignment]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_ROUNDS_AT_ONE_INSTANT = 100_000
"""Rounds of ready handles without time passing; over it the program is taken to spin."""
CLOCK_STEP_S = 1e-9
"""Rounding must not make a timer due before its own clock says so: it would be set again."""


class SimulationError(Exception):
    """Base: the simulated program cannot go on."""


class Deadlock(SimulationError):
    """Nothing is ready, no timer is set, and the main task has not finished."""


class Livelock(SimulationError):
    """The program steps on and on without letting time pass."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one task, as the trace hook sees it (before the step runs)."""

    time: float
    task_number: int
    task_name: str


TraceHook = Callable[[Step], None]


class Process:
    """Everything that descends from calls made through :meth:`run` belongs to the process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False
        self.rate = 1.0
        """Seconds of its clock in one true second."""
        self.ahead_s = 0.0
        """Its clock's reading is ``rate * true time + ahead_s``."""
        self._stops: list[tuple[float, float]] = []
        """From when until when it was stopped, in true time; the last may go on."""
        self._held: list[asyncio.Handle] = []
        self._context = contextvars.copy_context()
        self._context.run(_PROCESS.set, self)

    def run(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Calls a function within the process: tasks and timers it makes are the process's."""
        return self._context.copy().run(function, *args)

    def stop(self) -> None:
        """Nothing of the process runs until :meth:`resume`."""
        if not self.stopped:
            self._stops.append((true_time(), math.inf))
        self.stopped = True

    def resume(self) -> None:
        """What would have run meanwhile becomes ready, in order."""
        if self.stopped:
            self._stops[-1] = (self._stops[-1][0], true_time())
        self.stopped = False
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        held, self._held = self._held, []
        loop.make_ready(held)

    def was_stopped_at(self, true_s: float) -> bool:
        """Whether it was stopped then."""
        return any(first <= true_s <= last for first, last in self._stops)

    def hold(self, handle: asyncio.Handle) -> None:
        """Keeps what a stopped process would run now."""
        self._held.append(handle)

    def set_clock(self, rate: float, jump_s: float = 0.0) -> None:
        """From now on the clock goes at ``rate``; it jumps forward by ``jump_s`` first (monotonic
        clocks do not go back)."""
        if rate <= 0 or jump_s < 0:
            raise ValueError("a monotonic clock goes on")
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        reading = self.clock_at(loop.true_time) + jump_s
        self.rate, self.ahead_s = rate, reading - rate * loop.true_time
        loop.reorder_timers()

    def clock_at(self, true_s: float) -> float:
        """What its clock shows at a true time."""
        return self.rate * true_s + self.ahead_s

    def true_at(self, reading: float) -> float:
        """The first true time at which its clock shows that much."""
        if self.rate == 1.0 and not self.ahead_s:
            return reading
        true_s = (reading - self.ahead_s) / self.rate
        while self.clock_at(true_s) < reading:
            true_s += CLOCK_STEP_S
        return true_s


_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current_process() -> Process | None:
    """The process that is running; None outside of all."""
    return _PROCESS.get()


def true_time() -> float:
    """The running loop's time, whatever the running process's clock shows."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop.true_time


def outside(function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
    """Calls a function outside of all processes: what it makes belongs to none."""
    context = contextvars.copy_context()
    context.run(_PROCESS.set, None)
    return context.run(function, *args)


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module's docstring. ``seed`` None keeps ready tasks in spawn order."""

    _ready: collections.deque[asyncio.Handle]  # BaseEventLoop's; call_soon appends to it

    def __init__(self, seed: int | None, trace: TraceHook | None = None) -> None:
        super().__init__()
        self._now = 0.0
        self._random = None if seed is None else random.Random(seed)
        self._trace = trace
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._sequence = itertools.count()
        self._task_count = itertools.count(1)
        self._rounds = 0
        self._callback_error: BaseException | None = None
        self.set_task_factory(_numbered_task)
        self.set_exception_handler(self._keep_error)

    @property
    def true_time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def time(self) -> float:
        """The running process's clock; outside of all, the true time."""
        process = _PROCESS.get()
        return self._now if process is None else process.clock_at(self._now)

    def reorder_timers(self) -> None:
        """A process's clock was changed: its timers are due at other true times."""
        self._timers = [
            (self._due(_process_of(timer), timer.when()), count, timer)
            for _, count, timer in self._timers
        ]
        heapq.heapify(self._timers)

    def _due(self, process: Process | None, when: float) -> float:
        return when if process is None else max(process.true_at(when), self._now)

    def number_of(self, task: asyncio.Task[Any]) -> int:
        """Spawn number of a task of this loop, from 1."""
        number: int | None = getattr(task, "spawn_number", None)
        if number is None:
            number = next(self._task_count)
            task.spawn_number = number  # type: ignore[attr-defined]
        return number

    def make_ready(self, handles: Iterable[asyncio.Handle]) -> None:
        """Runs handles in the next round."""
        self._ready.extend(handles)

    # -- what BaseEventLoop asks of a loop, or does with sockets and threads ------------------

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        if self.is_closed():
            raise RuntimeError("the loop is closed")
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        due = self._due(_process_of(timer), when)
        heapq.heappush(self._timers, (due, next(self._sequence), timer))
        return timer

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        raise SimulationError(f"{func!r} wants a thread: nothing may leave the simulated world")

    def _write_to_self(self) -> None:
        """Wakes a loop that waits in a selector; this one never does."""

    def _run_once(self) -> None:
        if not self._ready:
            self._advance()
        while self._timers and self._timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(self._timers)[2])
        self._rounds += 1
        if self._rounds > MAX_ROUNDS_AT_ONE_INSTANT:
            self._rounds = 0
            raise Livelock(f"no time passes at {self._now} s:\n{self._describe_tasks()}")
        batch = list(self._ready)
        self._ready.clear()
        for handle, task in self._ordered(batch):
            if handle.cancelled():
                continue
            process = _process_of(handle)
            if process is not None and process.stopped:
                process.hold(handle)
                continue
            if task is not None and self._trace is not None:
                self._trace(Step(self._now, self.number_of(task), task.get_name()))
            handle._run()
            if self._callback_error is not None:
                error, self._callback_error = self._callback_error, None
                raise SimulationError("a callback or a forgotten task failed") from error

    # -- inside -------------------------------------------------------------------------------

    def _advance(self) -> None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        if not self._timers:
            raise Deadlock(f"at {self._now} s everyone waits:\n{self._describe_tasks()}")
        if self._timers[0][0] > self._now:
            self._now = self._timers[0][0]
            self._rounds = 0

    def _keep_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio would only log ends the run."""
        error = context.get("exception")
        self._callback_error = error or SimulationError(context.get("message", "unknown"))

    def _ordered(self, batch: list[asyncio.Handle]) -> list[_Ready]:
        if len(batch) == 1:
            return [(batch[0], _task_of(batch[0]))]
        callbacks: list[_Ready] = []
        steps: list[tuple[int, asyncio.Handle, asyncio.Task[Any]]] = []
        for handle in batch:
            task = _task_of(handle)
            if task is None:
                callbacks.append((handle, None))
            else:
                steps.append((self.number_of(task), handle, task))
        if len(steps) > 1:
            steps.sort(key=_first)
            if self._random is not None:
                self._random.shuffle(steps)
        callbacks += [(handle, task) for _, handle, task in steps]
        return callbacks

    def _describe_tasks(self) -> str:
        return "\n".join(
            f"  #{self.number_of(task)} {task.get_name()}: {_innermost_frame(task)}"
            for task in sorted(asyncio.all_tasks(self), key=self.number_of)
        )


def _numbered_task(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
    **options: Any,
) -> asyncio.Task[T]:
    assert isinstance(loop, VirtualLoop)
    task = asyncio.Task(coro, loop=loop, **options)
    task.set_name(f"task {loop.number_of(task)}")  # the default counts the whole process's tasks
    return task


def _innermost_frame(task: asyncio.Task[Any]) -> str:
    awaited: Any = task.get_coro()
    where = "?"
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None:
            where = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return where


_Ready = tuple[asyncio.Handle, asyncio.Task[Any] | None]
_first = itemgetter(0)


def _task_of(handle: asyncio.Handle) -> asyncio.Task[Any] | None:
    """The task whose step this is; None for a plain callback."""
    owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return owner if isinstance(owner, asyncio.Task) else None


def _process_of(handle: asyncio.Handle) -> Process | None:
    context: contextvars.Context = handle._context  # type: ignore[attr-defined]
    return context.get(_PROCESS)


class VirtualClock:
    """The clock port of gateways and workers, on the running loop's time."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def run(
    main: Callable[[], Coroutine[Any, Any, T]],
    seed: int | None = None,
    trace: TraceHook | None = None,
) -> T:
    """Runs ``main()`` to its end in virtual time and returns its result. Raises what it raises,
    Deadlock or Livelock; whatever still runs then is cancelled first."""
    loop = VirtualLoop(seed, trace)
    collecting = gc.isenabled()
    gc.disable()
    try:
        asyncio.set_event_loop(loop)
        try:
            task = loop.create_task(main(), name="main", context=_context())
            return loop.run_until_complete(task)
        finally:
            _cancel_rest(loop)
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        if collecting:
            gc.enable()


def _context() -> contextvars.Context:
    """As ``anyio.run`` makes it: where sniffio is installed, AnyIO asks it also in callbacks, which
    run in no task."""
    context = contextvars.copy_context()
    if sniffio is not None:
        context.run(sniffio.current_async_library_cvar.set, "asyncio")
    return context


def _cancel_rest(loop: VirtualLoop) -> None:
    rest = sorted(asyncio.all_tasks(loop), key=loop.number_of)
    for task in rest:
        task.cancel()
    if rest:
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
