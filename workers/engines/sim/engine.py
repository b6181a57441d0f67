"""The sim engine: real batching, page accounting and KV bytes; only the arithmetic is a hash.

A step takes as long as the timing model says. It is planned when it begins and computed when it
ends, in a callback of the event loop: the engine has no task, so nothing has to own one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from workers.engines.port import (
    EngineFailed,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    OnStep,
    PageExport,
    PageImport,
    StepOutput,
)
from workers.engines.scheduling import Generation, Scheduler, Work
from workers.engines.sim.config import SimConfig
from workers.engines.sim.model import STATE_BYTES, Context, next_token
from workers.engines.sim.pages import PageMemory, SimExport, SimImport
from workers.kv.blocks import block_hashes
from workers.kv.prefix_cache import PrefixCache

RATE_WEIGHT = 0.2
"""Weight of the newest step in the measured rates."""


class Timer(Protocol):
    """A callback that may still be called off."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]
"""Calls back once after so many seconds."""


def call_later_on_the_running_loop(delay_s: float, callback: Callable[[], None]) -> Timer:
    """In real time, or in virtual time on a simulation's loop."""
    return asyncio.get_running_loop().call_later(delay_s, callback)


class SimEngine:
    """Implements :class:`workers.engines.port.Engine`. ``clock`` gives monotonic seconds (pins
    expire by it); ``call_later`` lets a simulation freeze the engine with its process."""

    def __init__(
        self,
        config: SimConfig,
        clock: Callable[[], float],
        call_later: CallLater = call_later_on_the_running_loop,
    ) -> None:
        self._config = config
        self._info = config.info()
        self._call_later = call_later
        self._cache = PrefixCache(config.capacity_pages, clock)
        self._memory = PageMemory(config.capacity_pages, self._info.page_bytes)
        self._scheduler = Scheduler(
            self._info, self._cache, max_prefill_tokens=config.timing.max_prefill_tokens
        )
        self._exports: dict[SimExport, None] = {}
        self._on_step: OnStep | None = None
        self._on_failure: Callable[[EngineFailed], None] | None = None
        self._timer: Timer | None = None
        self._step_s = config.timing.step_s(1, 0)
        self._prefill_rate = 0.0
        self._decode_rate = 0.0

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        self._on_step = on_step
        self._on_failure = on_failure

    async def aclose(self) -> None:
        self._on_step = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._scheduler.end_step()
        for generation_id in self._scheduler.generation_ids():
            self._scheduler.cancel(generation_id)

    # -- generations --------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        if self._on_step is None:
            raise EngineFailed("the engine is not running")
        queued = self._scheduler.queued + 1
        self._scheduler.submit(request, retry_after_ms=int(1000 * self._step_s * queued) + 1)
        self._wake()

    def park(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, True)

    def unpark(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, False)
        self._wake()

    def cancel(self, generation_id: str) -> None:
        self._scheduler.cancel(generation_id)
        self._wake()

    # -- cache --------------------------------------------------------------------------------

    def block_hashes(self, namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
        return block_hashes(self._info.kv_fingerprint, namespace, tokens, self._info.page_size)

    def resident_pages(self, block_hashes: Sequence[bytes]) -> int:
        return len(self._cache.match(block_hashes))

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        return self._cache.pin(pin_id, block_hashes, ttl_s)

    def unpin(self, pin_id: str) -> None:
        self._cache.unpin(pin_id)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        return self._cache.drop(block_hashes)

    def export_pages(self, block_hashes: Sequence[bytes]) -> PageExport:
        def released(ended: SimExport) -> None:
            del self._exports[ended]
            self._wake()

        export = SimExport(self._cache, self._memory, block_hashes, released)
        self._exports[export] = None
        return export

    def reserve_import(
        self, namespace: bytes, tokens: Sequence[int], first_page: int, pages: int
    ) -> PageImport:
        hashes = self.block_hashes(namespace, tokens)
        reservation = self._cache.reserve(hashes, first_page, pages)
        return SimImport(self._memory, reservation, self._wake)

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._scheduler.running,
            queued=self._scheduler.queued,
            queued_prefill_tokens=self._scheduler.pending_prefill_tokens,
            free_pages=self._cache.free_pages,
            pinned_pages=self._cache.pinned_pages,
            prefill_tokens_per_s=self._prefill_rate,
            decode_tokens_per_s=self._decode_rate,
        )

    def check_integrity(self) -> None:
        """Also compares the bytes of every cached page with the checksum taken when sealed."""
        exports = [export.held for export in self._exports]
        self._cache.check_integrity([*self._scheduler.holders(), *exports])
        for page in self._cache.sealed_pages():
            assert self._memory.checksum(page) == self._cache.meta(page).checksum, (
                f"page {page} was overwritten after it was sealed"
            )

    # -- steps --------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Begins a step unless one is under way or nothing can be done. Not at once but in the
        next round of the loop, so that requests made together share their first step."""
        if self._timer is None and self._on_step is not None:
            self._timer = self._call_later(0.0, self._begin_step)

    def _begin_step(self) -> None:
        self._timer = None
        try:
            works, failures = self._scheduler.plan()
        except Exception as error:  # noqa: BLE001 - whatever it is, every generation is lost
            self._fail(error)
            return
        self._deliver(failures)
        if works:
            decode = sum(work.count for work in works if work.count == 1)
            prefill = sum(work.count for work in works if work.count > 1)
            self._step_s = self._config.timing.step_s(decode, prefill)
            self._measure(decode, prefill)
            self._timer = self._call_later(self._step_s, lambda: self._finish_step(works))

    def _finish_step(self, works: Sequence[Work]) -> None:
        self._timer = None
        try:
            outputs = [output for work in works for output in self._compute(work)]
            self._scheduler.end_step()
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
            return
        self._wake()
        self._deliver(outputs)

    def _fail(self, error: Exception) -> None:
        on_failure, self._on_step = self._on_failure, None
        if on_failure is not None:
            failure = EngineFailed(f"a step failed: {error!r}")
            failure.__cause__ = error
            on_failure(failure)

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        if outputs and self._on_step is not None:
            self._on_step(outputs)

    def _measure(self, decode: int, prefill: int) -> None:
        if prefill:
            rate, old = prefill / self._step_s, self._prefill_rate
            self._prefill_rate = old + RATE_WEIGHT * (rate - old) if old else rate
        if decode:
            rate, old = 1 / self._step_s, self._decode_rate
            self._decode_rate = old + RATE_WEIGHT * (rate - old) if old else rate

    def _compute(self, work: Work) -> list[StepOutput]:
        generation = work.generation
        if generation.ended:
            return []
        context = self._fill_pages(work)
        self._scheduler.advance(work, self._memory.checksum)
        if generation.pending:
            return []
        return [self._scheduler.add_token(generation, self._say(generation, context))]

    def _fill_pages(self, work: Work) -> Context:
        """Computes the work's states into its pages, going on from the states it finds there."""
        generation, size = work.generation, self._info.page_size
        context = generation.state
        if not isinstance(context, Context):
            context = generation.state = Context()
            for page in generation.pages[: work.start // size]:
                context.read(self._memory.page(page))
        for position in range(work.start, work.start + work.count):
            content = self._memory.page(generation.pages[position // size])
            slot = position % size * STATE_BYTES
            content[slot : slot + STATE_BYTES] = context.compute(generation.tokens[position])
        return context

    def _say(self, generation: Generation, context: Context) -> int:
        request = generation.request
        free = generation.generated >= request.min_new_tokens
        return next_token(
            context.attention(),
            context.length,
            request.sampling,
            self._config.eos_probability,
            banned=() if free else request.stop_token_ids,
        )
