"""Group commit: the appends of all running turns, in one pipeline per lane at a time.

Every engine step asks for one append per running turn. Sending each by itself would cost a round
trip per turn and step; a lane instead gathers whatever is asked for while its last pipeline is
under way, and sends that as the next one. Batches so grow with the store's latency, and each
waiter is released by its own outcome (after the group commit of Gray and Reuter, ch. 9).

A lane belongs to a part of the key space (one store shard at best), so that a shard that does not
answer holds up only the sessions that live there.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from anyio.abc import TaskStatus

from gateway.telemetry.metrics import WorkerMetrics
from statestore.ports import (
    Append,
    AppendOutcome,
    Fenced,
    JournalPort,
    StoreError,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

MAX_BATCH = 256
"""Appends in one pipeline; what is over it waits for the next one."""

FIRST_BACKOFF_S = 0.005
MAX_BACKOFF_S = 0.5

T = TypeVar("T")


async def until_answered(call: Callable[[], Awaitable[T]], give_up_at: float) -> T:
    """Repeats an idempotent store call unchanged until it is answered (P3).

    ``give_up_at`` is in the event loop's clock; past it the last StoreUnavailable is raised. Other
    failures are raised at once.
    """
    backoff = FIRST_BACKOFF_S
    while True:
        try:
            return await call()
        except StoreUnavailable:
            if anyio.current_time() + backoff >= give_up_at:
                raise
            await anyio.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_S)


@dataclass(slots=True)
class _Waiting:
    append: Append
    give_up_at: float
    done: anyio.Event = field(default_factory=anyio.Event)
    outcome: AppendOutcome | StoreError | None = None
    abandoned: bool = False

    def resolve(self, outcome: AppendOutcome | StoreError) -> None:
        self.outcome = outcome
        self.done.set()


class _Lane:
    """One pipeline in flight; at most one append per session waits or flies (the caller's duty,
    checked here), so the queue is bounded by the number of running turns."""

    def __init__(self, store: JournalPort, metrics: WorkerMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._sessions: set[str] = set()
        self._wake = anyio.Event()

    async def submit(self, append: Append, give_up_at: float) -> AppendOutcome:
        if append.session_id in self._sessions:
            raise AssertionError(f"{append.session_id}: a commit is already under way")
        waiting = _Waiting(append, give_up_at)
        self._sessions.add(append.session_id)
        self._queue.append(waiting)
        self._wake.set()
        try:
            await waiting.done.wait()
        finally:
            # Also when the caller is cancelled: what already flies may be applied, as after a
            # lost reply, but it is not sent again.
            waiting.abandoned = True
            self._sessions.discard(append.session_id)
        if isinstance(waiting.outcome, StoreError):
            raise waiting.outcome
        assert waiting.outcome is not None
        return waiting.outcome

    async def run(self) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            if not self._queue:
                self._wake = anyio.Event()
                await self._wake.wait()
            taken = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
            batch = [waiting for waiting in taken if not waiting.abandoned]
            unanswered = await self._send(batch) if batch else []
            if not unanswered:
                backoff = FIRST_BACKOFF_S
                continue
            # Unanswered appends go first again, unchanged; the store is given time to recover.
            self._queue.extendleft(reversed(unanswered))
            await anyio.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_S)

    async def _send(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Resolves what was answered; returns what was not and may still be retried."""
        sent_at = anyio.current_time()
        outcomes = await self._store.append_many([waiting.append for waiting in batch])
        now = anyio.current_time()
        self._metrics.committed(len(batch), now - sent_at)
        unanswered: list[_Waiting] = []
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, StoreUnavailable) and now < waiting.give_up_at:
                unanswered.append(waiting)
            else:
                if isinstance(outcome, Fenced):
                    self._metrics.fenced("append")
                waiting.resolve(outcome)
        return unanswered


class Journal:
    """The group-commit side of a replica's store. :meth:`run` must be running for appends to be
    sent. Raises nothing but what the store raises for one append."""

    def __init__(
        self, store: JournalPort, *, lanes: int = 1, metrics: WorkerMetrics | None = None
    ) -> None:
        if lanes < 1:
            raise ValueError("a journal needs at least one lane")
        self._lanes = tuple(_Lane(store, metrics or WorkerMetrics()) for _ in range(lanes))

    async def append(self, append: Append, give_up_at: float) -> AppendOutcome:
        """Journals one append; at most one per session at a time.

        Retried unchanged while the store does not answer, until ``give_up_at`` in the loop's
        clock; then StoreUnavailable is raised. Other StoreErrors are raised at once.
        """
        return await self._lane_of(append.session_id).submit(append, give_up_at)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs the lanes until cancelled."""
        async with anyio.create_task_group() as tasks:
            for lane in self._lanes:
                tasks.start_soon(lane.run)
            task_status.started()

    def _lane_of(self, session_id: str) -> _Lane:
        family = session_id.partition(".")[0]
        return self._lanes[zlib.crc32(family.encode()) % len(self._lanes)]
