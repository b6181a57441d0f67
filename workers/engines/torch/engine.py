"""The embedded engine: paged KV, prefix caching and continuous batching on one CPU or GPU.

All bookkeeping happens on the event loop's thread. The engine's own thread only computes: it is
handed an immutable step, and hands back its result, one step at a time. So nothing is locked, and
the pages of a generation that is cancelled during a step are freed when the step has ended.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

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
from workers.engines.scheduling import Scheduler, Work
from workers.engines.torch.config import CHUNK_ALIGNMENT, PAGE_SIZE, TorchEngineConfig
from workers.engines.torch.model_store import model_folder
from workers.engines.torch.rates import StepRates
from workers.engines.torch.runner import ModelRunner, Part, StepResult
from workers.engines.torch.sampling import Draw
from workers.engines.torch.transfer import TorchPageExport, TorchPageImport
from workers.kv.blocks import block_hashes
from workers.kv.prefix_cache import PrefixCache

MIN_RETRY_MS, MAX_RETRY_MS = 100, 10_000
"""Bounds of the delay that an overloaded engine asks for."""


class TorchEngine:
    """See the port :class:`workers.engines.port.Engine`. ``clock`` gives monotonic seconds (for
    pins). Everything but :meth:`start` and :meth:`aclose` needs a started engine."""

    def __init__(self, config: TorchEngineConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._steps: queue.SimpleQueue[Sequence[Part] | None] = queue.SimpleQueue()
        """To the thread: at most one step (and then None, to end it)."""
        self._thread: threading.Thread | None = None
        self._failure: EngineFailed | None = None
        self._closed = False
        self._works: list[Work] = []
        """Of the step under way."""
        self._pump_due = False
        self._exports: dict[TorchPageExport, None] = {}
        self._rates = StepRates()

    # -- life ---------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Raises EngineFailed if the model cannot be loaded."""
        self._loop = asyncio.get_running_loop()
        self._on_step = on_step
        self._on_failure = on_failure
        self._loaded = anyio.Event()
        folder = await anyio.to_thread.run_sync(model_folder, self._config.model)
        self._thread = threading.Thread(
            target=self._compute, args=(folder,), name="torch-engine", daemon=True
        )
        self._thread.start()
        await self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        thread, self._thread, self._closed = self._thread, None, True
        if thread is None:
            return
        self._steps.put(None)
        with anyio.CancelScope(shield=True):  # at most one step long
            await anyio.to_thread.run_sync(thread.join)
        if self._loaded.is_set() and self._failure is None:
            self._works = []
            self._scheduler.end_step()
            for generation_id in self._scheduler.generation_ids():
                self._scheduler.cancel(generation_id)

    # -- generations --------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise EngineFailed("the engine is closed")
        self._scheduler.submit(request, self._retry_after_ms())
        self._pump_soon()

    def park(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, True)

    def unpark(self, generation_id: str) -> None:
        self._scheduler.set_parked(generation_id, False)
        self._pump_soon()

    def cancel(self, generation_id: str) -> None:
        self._scheduler.cancel(generation_id)
        self._pump_soon()

    # -- cached pages -------------------------------------------------------------------------

    def block_hashes(self, namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
        return block_hashes(self._info.kv_fingerprint, namespace, tokens, PAGE_SIZE)

    def resident_pages(self, block_hashes: Sequence[bytes]) -> int:
        return len(self._cache.match(block_hashes))

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        return self._cache.pin(pin_id, block_hashes, ttl_s)

    def unpin(self, pin_id: str) -> None:
        self._cache.unpin(pin_id)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        return self._cache.drop(block_hashes)

    def export_pages(self, block_hashes: Sequence[bytes]) -> PageExport:
        export = TorchPageExport(self._runner.pool, self._cache, block_hashes, self._forget_export)
        self._exports[export] = None
        return export

    def reserve_import(
        self, namespace: bytes, tokens: Sequence[int], first_page: int, pages: int
    ) -> PageImport:
        reservation = self._cache.reserve(self.block_hashes(namespace, tokens), first_page, pages)
        return TorchPageImport(self._runner.pool, reservation, self._pump_soon)

    def _forget_export(self, export: TorchPageExport) -> None:
        del self._exports[export]
        self._pump_soon()

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
        exported = [export.held for export in self._exports]
        self._cache.check_integrity([*self._scheduler.holders(), *exported])

    def _retry_after_ms(self) -> int:
        rate = self._rates.prefill or 1.0
        delay = 1000.0 * self._scheduler.pending_prefill_tokens / rate
        return int(min(max(delay, MIN_RETRY_MS), MAX_RETRY_MS))

    # -- steps, on the event loop's thread ----------------------------------------------------

    def _pump_soon(self) -> None:
        """Plans a step after the present callbacks, so that what is submitted together is
        batched together."""
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        self._deliver(self._begin_step())

    def _begin_step(self) -> list[StepOutput]:
        """Hands the next step to the thread, if none is under way. Returns the ends of generations
        that can never fit."""
        if self._works or self._closed or self._failure is not None:
            return []
        try:
            self._works, failures = self._scheduler.plan()
            parts = [_part(work) for work in self._works]
        except Exception as error:  # noqa: BLE001 - the books are broken, whatever it is
            self._fail(error)
            return []
        if parts:
            self._steps.put(parts)
        elif failures:
            self._pump_soon()  # what they held is free now
        return failures

    def _finish_step(self, result: StepResult) -> None:
        if self._closed:
            return
        works, self._works = self._works, []
        try:
            outputs = self._enter(works, result)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
            return
        # Begun first, so that the next step computes while these outputs are handled.
        failures = self._begin_step()
        self._deliver(outputs)
        self._deliver(failures)

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        if outputs and not self._closed:
            self._on_step(outputs)

    def _enter(self, works: Sequence[Work], result: StepResult) -> list[StepOutput]:
        outputs = []
        for work, part in zip(works, result.parts, strict=True):
            self._scheduler.advance(work, part.checksums.__getitem__)
            if part.token is not None and not work.generation.ended:
                outputs.append(self._scheduler.add_token(work.generation, part.token))
        self._scheduler.end_step()
        prefill = sum(work.count for work in works if work.count > 1)
        decoding = any(work.count == 1 for work in works)
        self._rates.record(prefill, decoding, result.seconds)
        return outputs

    def _finish_loading(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._info = _engine_info(self._config, runner)
        self._cache = PrefixCache(self._info.capacity_pages, self._clock)
        self._scheduler = Scheduler(
            self._info,
            self._cache,
            max_prefill_tokens=self._config.max_prefill_tokens_per_step,
            chunk_multiple=CHUNK_ALIGNMENT,
        )
        self._loaded.set()

    def _fail(self, error: Exception) -> None:
        self._failure = EngineFailed(f"the torch engine failed: {error!r}; restart the replica")
        self._failure.__cause__ = error
        if not self._loaded.is_set():
            self._loaded.set()
        elif not self._closed:
            self._on_failure(self._failure)

    # -- on the engine's thread ---------------------------------------------------------------

    def _compute(self, folder: Path) -> None:
        try:
            runner = ModelRunner(folder, self._config)
            runner.warm_up()
            self._post(self._finish_loading, runner)
            while (parts := self._steps.get()) is not None:
                self._post(self._finish_step, runner.step(parts))
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the engine and is told
            self._post(self._fail, error)

    def _post(self, callback: Callable[..., None], value: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, value)


def _part(work: Work) -> Part:
    generation, end = work.generation, work.start + work.count
    request = generation.request
    draw = None
    if end == len(generation.tokens):
        early = generation.generated < request.min_new_tokens
        draw = Draw(request.sampling, end, request.stop_token_ids if early else frozenset())
    return Part(
        tokens=tuple(generation.tokens[work.start : end]),
        start=work.start,
        pages=tuple(generation.pages[: -(-end // PAGE_SIZE)]),
        filled=tuple(generation.pages[generation.sealed : end // PAGE_SIZE]),
        draw=draw,
    )


def _engine_info(config: TorchEngineConfig, runner: ModelRunner) -> EngineInfo:
    limit = runner.max_context_tokens
    return EngineInfo(
        engine="torch",
        model=Path(config.model).name,
        vocab_size=runner.vocab_size,
        max_context_tokens=min(limit, config.max_context_tokens or limit),
        page_size=PAGE_SIZE,
        capacity_pages=runner.capacity_pages,
        page_bytes=runner.pool.page_bytes,
        kv_fingerprint=runner.kv_fingerprint,
        max_running=config.max_running,
        max_queued=config.max_queued,
        eos_token_ids=runner.eos_token_ids,
    )
