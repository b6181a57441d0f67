"""The sim engine: real batching, page accounting and KV bytes; only the arithmetic is a hash.

A step takes as long as the timing model says. It is planned when it begins and computed when it
ends, in a callback of the event loop: the engine has no task, so nothing has to own one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from workers.engines.paged import PagedEngine
from workers.engines.port import EngineFailed, OnStep, StepOutput
from workers.engines.scheduling import Generation, Work
from workers.engines.sim.config import SimConfig
from workers.engines.sim.memory import SimMemory
from workers.engines.sim.model import STATE_BYTES, Context, next_token
from workers.kv.pages import checksum


class SimEngine(PagedEngine):
    """See the port :class:`workers.engines.port.Engine`. Runs in real time, or in virtual time on a
    simulation's loop."""

    def __init__(self, config: SimConfig, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._config = config
        info = config.info()
        self._pages = SimMemory(config.capacity_pages, info.page_bytes)
        self._equip(info, self._pages, max_prefill_tokens=config.timing.max_prefill_tokens)

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        self._serve(on_step, on_failure)

    async def aclose(self) -> None:
        self._stop()

    def _compute(self, works: Sequence[Work]) -> None:
        decode = sum(work.count for work in works if work.count == 1)
        prefill = sum(work.count for work in works if work.count > 1)
        seconds = self._config.timing.step_s(decode, prefill)
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self._finish_step, self._enter, seconds)

    def _enter(self, works: Sequence[Work]) -> list[StepOutput]:
        outputs = []
        for work in works:
            generation = work.generation
            if generation.ended:
                continue
            context = self._fill_pages(work)
            self._scheduler.advance(work, lambda page: checksum(self._pages.page(page)))
            if not generation.pending:
                token = self._say(generation, context)
                outputs.append(self._scheduler.add_token(generation, token))
        return outputs

    def _fill_pages(self, work: Work) -> Context:
        """Computes the work's states into its pages, going on from the states it finds there."""
        generation, size = work.generation, self._info.page_size
        context = generation.state
        if not isinstance(context, Context):
            context = generation.state = Context()
            for page in generation.pages[: work.start // size]:
                context.read(self._pages.page(page))
        for position in range(work.start, work.start + work.count):
            content = self._pages.page(generation.pages[position // size])
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
