"""What engines that run their own steps have in common: everything of the port but the computing.

All bookkeeping happens on the event loop's thread. Steps follow one another: planned, computed by
the engine in its own way, entered, delivered.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

from workers.engines.cached_pages import CachedPages
from workers.engines.port import (
    EngineFailed,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    OnStep,
    StepOutput,
)
from workers.engines.rates import StepRates
from workers.engines.scheduling import Scheduler, Work
from workers.kv.pages import PageMemory

MIN_RETRY_MS, MAX_RETRY_MS = 100, 10_000
"""Bounds of the delay that an overloaded engine asks for."""


class PagedEngine(CachedPages, ABC):
    """Base of engines (see the port :class:`workers.engines.port.Engine`). A subclass calls
    :meth:`_equip` before anything else is used, :meth:`_serve` at the end of ``start`` and
    :meth:`_stop` in ``aclose``. ``clock`` gives monotonic seconds (pins expire by it)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._on_step: OnStep | None = None
        """None while the engine does not run: not yet, not any more, or failed."""
        self._failure: EngineFailed | None = None
        self._works: list[Work] = []
        """Of the step under way."""
        self._wake_due = False
        self._rates = StepRates()

    def _equip(
        self,
        info: EngineInfo,
        memory: PageMemory,
        *,
        max_prefill_tokens: int,
        chunk_multiple: int = 1,
    ) -> None:
        """See :class:`Scheduler` for the last two."""
        self._keep_pages(info, memory, self._clock)
        self._scheduler = Scheduler(
            info, self._cache, max_prefill_tokens=max_prefill_tokens, chunk_multiple=chunk_multiple
        )

    @abstractmethod
    def _compute(self, works: Sequence[Work]) -> None:
        """Begins to compute a step; :meth:`_finish_step` must be called once it is done."""

    # -- life ---------------------------------------------------------------------------------

    def _serve(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        self._on_step = on_step
        self._on_failure = on_failure

    def _stop(self) -> None:
        """Ends every generation; the pages of a step under way must not be written to any more."""
        self._on_step = None
        if self._failure is None:  # else the books may be broken
            self._works = []
            self._scheduler.end_step()
            for generation_id in self._scheduler.generation_ids():
                self._scheduler.cancel(generation_id)

    def _fail(self, error: Exception) -> None:
        """Whatever it is, every generation is lost."""
        failure = EngineFailed(f"the engine failed: {error!r}; restart the replica")
        failure.__cause__ = error
        self._failure = error if isinstance(error, EngineFailed) else failure
        if self._on_step is not None:
            self._on_step = None
            self._on_failure(self._failure)

    # -- generations --------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        if self._on_step is None:
            raise self._failure or EngineFailed("the engine is not running")
        self._scheduler.submit(request, self._retry_after_ms(), now=self._clock())
        self._wake()

    def park(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, True)

    def unpark(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, False)
        self._wake()

    def cancel(self, generation_id: str) -> None:
        self._scheduler.cancel(generation_id)
        self._wake()

    def _pages_freed(self) -> None:
        self._wake()

    # -- reports ------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._scheduler.running,
            queued=self._scheduler.queued,
            queued_prefill_tokens=self._scheduler.pending_prefill_tokens,
            free_pages=self._cache.free_pages,
            pinned_pages=self._cache.pinned_pages,
            prefill_tokens_per_s=self._rates.prefill,
            decode_tokens_per_s=self._rates.decode,
        )

    def check_integrity(self) -> None:
        """Also compares the bytes of every cached page with the checksum taken when sealed."""
        self._check_pages(self._scheduler.holders())

    def _retry_after_ms(self) -> int:
        rate = self._rates.prefill or 1.0
        delay = 1000.0 * self._scheduler.pending_prefill_tokens / rate
        return int(min(max(delay, MIN_RETRY_MS), MAX_RETRY_MS))

    # -- steps --------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Plans a step after the present callbacks, so that what is submitted together is
        batched together."""
        if self._on_step is not None and not self._wake_due:
            self._wake_due = True
            asyncio.get_running_loop().call_soon(self._woken)

    def _woken(self) -> None:
        self._wake_due = False
        self._deliver(self._begin_step())

    def _begin_step(self) -> list[StepOutput]:
        """Begins the next step, if none is under way. Returns the ends of generations that can
        never fit."""
        if self._works or self._on_step is None:
            return []
        try:
            self._works, failures = self._scheduler.plan()
            if self._works:
                self._note_begins()
                self._compute(self._works)
        except Exception as error:  # noqa: BLE001 - the books are broken, whatever it is
            self._fail(error)
            return []
        if failures and not self._works:
            self._wake()  # what they held is free now
        return failures

    def _finish_step(
        self, enter: Callable[[Sequence[Work]], list[StepOutput]], seconds: float
    ) -> None:
        """The step under way is computed, in ``seconds``: ``enter`` reports it to the scheduler and
        returns what it gave."""
        if self._on_step is None:
            return
        works, self._works = self._works, []
        try:
            outputs = [self._with_queue_time(output, works) for output in enter(works)]
            self._scheduler.end_step()
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
            return
        prefill = sum(work.count for work in works if work.count > 1)
        self._rates.record(prefill, any(work.count == 1 for work in works), seconds)
        # Begun first, so that the next step computes while these outputs are handled.
        failures = self._begin_step()
        self._deliver(outputs)
        self._deliver(failures)

    def _note_begins(self) -> None:
        now = self._clock()
        for work in self._works:
            if work.generation.begun_at is None:
                work.generation.begun_at = now

    @staticmethod
    def _with_queue_time(output: StepOutput, works: Sequence[Work]) -> StepOutput:
        """A first output says how long its generation has waited."""
        if output.cached_tokens is None:
            return output
        for work in works:
            generation = work.generation
            if generation.request.generation_id == output.generation_id:
                begun_at = generation.begun_at or generation.submitted_at
                return replace(output, queue_s=begun_at - generation.submitted_at)
        return output

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        if outputs and self._on_step is not None:
            self._on_step(outputs)
