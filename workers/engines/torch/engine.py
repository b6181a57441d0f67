"""The embedded engine: paged KV, prefix caching and continuous batching on one CPU or GPU.

All bookkeeping happens on the event loop's thread. The engine's own thread only computes: it is
handed an immutable step, and hands back its result, one step at a time. So nothing is locked, and
the pages of a generation that is cancelled during a step are freed when the step has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anyio

from workers.engines.model_store import model_folder
from workers.engines.paged import PagedEngine
from workers.engines.port import EngineFailed, EngineInfo, OnStep, StepOutput
from workers.engines.scheduling import Work
from workers.engines.torch.config import CHUNK_ALIGNMENT, PAGE_SIZE, TorchEngineConfig
from workers.engines.torch.runner import ModelRunner, Part, StepResult
from workers.engines.torch.sampling import Draw


class TorchEngine(PagedEngine):
    """See the port :class:`workers.engines.port.Engine`. Everything but :meth:`start` and
    :meth:`aclose` needs a started engine."""

    def __init__(self, config: TorchEngineConfig, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._config = config
        self._steps: queue.SimpleQueue[Sequence[Part] | None] = queue.SimpleQueue()
        """To the thread: at most one step (and then None, to end it)."""
        self._thread: threading.Thread | None = None

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Raises EngineFailed if the model cannot be loaded."""
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # of the thread there, callbacks know no loop
        self._loaded = anyio.Event()
        folder = await anyio.to_thread.run_sync(model_folder, self._config.model)
        self._thread = threading.Thread(
            target=self._run, args=(folder,), name="torch-engine", daemon=True
        )
        self._thread.start()
        await self._loaded.wait()
        if self._failure is not None:
            raise self._failure
        self._serve(on_step, on_failure)

    async def aclose(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._on_step = None
        self._steps.put(None)
        with anyio.CancelScope(shield=True):  # at most one step long
            await anyio.to_thread.run_sync(thread.join)
        if self._loaded.is_set():
            self._stop()

    # -- steps, on the event loop's thread ----------------------------------------------------

    def _compute(self, works: Sequence[Work]) -> None:
        self._steps.put([_part(work) for work in works])

    def _enter(self, result: StepResult, works: Sequence[Work]) -> list[StepOutput]:
        outputs = []
        for work, part in zip(works, result.parts, strict=True):
            if work.generation.ended:
                continue
            self._scheduler.advance(work, part.checksums.__getitem__)
            if part.token is not None:
                outputs.append(self._scheduler.add_token(work.generation, part.token))
        return outputs

    def _computed(self, result: StepResult) -> None:
        self._finish_step(partial(self._enter, result), result.seconds)

    def _finish_loading(self, runner: ModelRunner) -> None:
        self._equip(
            _engine_info(self._config, runner),
            runner.pool,
            max_prefill_tokens=self._config.max_prefill_tokens_per_step,
            chunk_multiple=CHUNK_ALIGNMENT,
        )
        self._loaded.set()

    def _broke(self, error: Exception) -> None:
        self._fail(error)
        self._loaded.set()

    # -- on the engine's thread ---------------------------------------------------------------

    def _run(self, folder: Path) -> None:
        try:
            runner = ModelRunner(folder, self._config)
            runner.warm_up()
            self._post(self._finish_loading, runner)
            while (parts := self._steps.get()) is not None:
                self._post(self._computed, runner.step(parts))
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the engine and is told
            self._post(self._broke, error)

    def _post(self, callback: Callable[..., None], value: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, value, context=self._context)


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
