"""Real sglang engines that tests share, each as good as new for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from tests.support.engines import EngineHarness, EngineSize, Output
from workers.engines.model_store import model_folder
from workers.engines.port import Sampling
from workers.engines.sglang.config import SglangConfig

if TYPE_CHECKING:
    from workers.engines.sglang.engine import SglangEngine

PAGE = 16
SETTLE_S = 10.0


class SglangHarness(EngineHarness):
    """What is asked of pages waits until sglang has written them."""

    engine: SglangEngine
    noise = Sampling()  # on the CPU only this repeats
    wait_s = 120.0

    async def end_of(self, generation_id: str) -> Output:
        output = await super().end_of(generation_id)
        await self.settled()
        return output

    async def settled(self) -> None:
        """sglang writes pages behind the scenes: until nothing more comes."""
        count, still = -1, 0
        with anyio.fail_after(SETTLE_S):
            while still < 3:
                now = self.engine._cache.cached_pages
                count, still = now, still + 1 if now == count else 0
                await anyio.sleep(0.03)


class _Clock:
    """A clock that can be exchanged for a test's."""

    def __init__(self) -> None:
        self.source: Callable[[], float] = lambda: 0.0

    def __call__(self) -> float:
        return self.source()


class SharedEngines:
    """Starts what is asked for and not there, or in use."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._idle: dict[int, list[tuple[SglangEngine, _Clock]]] = {}

    @asynccontextmanager
    async def engine(
        self, size: EngineSize, clock: Callable[[], float]
    ) -> AsyncIterator[SglangHarness]:
        idle = self._idle.setdefault(size.capacity_pages, [])
        engine, own_clock = idle.pop() if idle else await self._start(size.capacity_pages)
        own_clock.source = clock
        harness = SglangHarness(engine)
        generations = engine._generations
        generations.on_step = lambda outputs: harness.on_output(outputs)
        engine._on_failure = harness.failures.append
        usual = engine.info
        engine._info = generations.info = replace(
            usual,
            max_running=size.max_running,
            max_queued=size.max_queued,
            max_context_tokens=min(size.max_context_tokens, usual.max_context_tokens),
        )
        try:
            yield harness
            engine.check_integrity()
            assert not harness.failures
        finally:
            generations.clear()
            engine._info = generations.info = usual
            if generations.on_step is not None:  # else the test has closed it
                with anyio.CancelScope(shield=True), anyio.fail_after(SETTLE_S):
                    while not await engine.flush():
                        await anyio.lowlevel.checkpoint()
                idle.append((engine, own_clock))

    async def _start(self, pages: int) -> tuple[SglangEngine, _Clock]:
        from workers.engines.sglang.engine import SglangEngine

        config = SglangConfig.from_options(
            {
                "host_pages": str(pages),
                "max_total_tokens": str(pages * PAGE),
                "max_running": "8",
                "chunked_prefill_size": "64",
            }
        )
        clock = _Clock()
        engine = SglangEngine(config, model_folder(), clock)
        self._stack.push_async_callback(engine.aclose)
        await engine.start(lambda outputs: None, lambda error: None)
        return engine, clock
