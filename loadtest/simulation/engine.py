"""The sim engine as the simulation runs it: it can be disturbed, and its use of KV is watched.

Whenever a generation goes on from cached pages, what is in them is compared with the states of the
generation's own tokens (I5), and whether the pages were computed for the same tenant (I10). Both
are recomputed from the model alone; the block hashes and checksums of the code under test play no
part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio

from workers.engines.scheduling import Work
from workers.engines.sim.config import SimConfig
from workers.engines.sim.engine import SimEngine
from workers.engines.sim.memory import SimMemory
from workers.engines.sim.model import STATE_BYTES, Context
from workers.kv.pages import checksum


def page_of(model: Context, tokens: Sequence[int]) -> bytes:
    """What a page of these tokens holds; ``model`` goes on behind them."""
    return b"".join(model.compute(token) for token in tokens)


class WatchedMemory(SimMemory):
    """Knows for which namespace a page was computed, here or where it was imported from."""

    def __init__(self, capacity: int, page_bytes: int) -> None:
        super().__init__(capacity, page_bytes)
        self.computed_for: dict[int, bytes] = {}
        self.arriving_for: dict[int, bytes] = {}
        """Pages that are being imported: for which namespace their source has computed them."""

    def write(self, page: int, raw: memoryview) -> None:
        self.computed_for.pop(page, None)
        if page in self.arriving_for:
            self.computed_for[page] = self.arriving_for.pop(page)
        super().write(page, raw)


class WatchedEngine(SimEngine):
    """``complain`` is told of violations."""

    def __init__(self, config: SimConfig, complain: Callable[[str], None]) -> None:
        super().__init__(config, anyio.current_time)
        self._watched = WatchedMemory(config.capacity_pages, self.info.page_bytes)
        self._pages = self._memory = self._watched
        self._usual = config
        self._complain = complain
        self.verified_pages = 0

    def slow_down(self, factor: float) -> None:
        """Steps take this many times as long as usual from now on; 1: as usual."""
        timing = replace(self._usual.timing, step_ms=self._usual.timing.step_ms * factor)
        self._config = replace(self._usual, timing=timing)

    def page_arrives(
        self, source: WatchedEngine, export: Any, reservation: Any, index: int
    ) -> None:
        """A page is read from another replica, for a reservation here."""
        inner = getattr(export, "_export", export)
        page, target = inner._run[index], reservation._reservation.pages[index]
        if checksum(source._watched.page(page)) != inner.pages[index].checksum:
            self._complain(f"P13: a page is sent that is not the exported one any more ({index})")
        if source.info.kv_fingerprint != self.info.kv_fingerprint:
            self._complain("P14: KV of another model arrives")
        self._watched.arriving_for.pop(target, None)
        if page in source._watched.computed_for:
            self._watched.arriving_for[target] = source._watched.computed_for[page]

    def lacks(self, states: Sequence[bytes]) -> int:
        """How many of these pages' contents are cached nowhere here."""
        cached = {bytes(self._watched.page(page)) for page in self._cache.sealed_pages()}
        return sum(state not in cached for state in states)

    @property
    def as_usual(self) -> bool:
        """Not slowed down."""
        return self._config.timing == self._usual.timing

    def evict_all(self) -> int:
        """Drops every cached page that nobody holds, pinned or not. Returns how many there were."""
        before = self._cache.cached_pages
        self._cache.release(self._cache.allocate(self._cache.free_pages))
        return before - self._cache.cached_pages

    def _fill_pages(self, work: Work) -> Context:
        generation, size = work.generation, self._info.page_size
        if not isinstance(generation.state, Context):
            self._verify(work)
        context = super()._fill_pages(work)
        first, last = work.start // size, (work.start + work.count - 1) // size
        for page in generation.pages[first : last + 1]:
            self._watched.computed_for[page] = generation.request.namespace
        return context

    def _verify(self, work: Work) -> None:
        generation, size = work.generation, self._info.page_size
        name = generation.request.generation_id
        model = Context()
        for index, page in enumerate(generation.pages[: work.start // size]):
            tokens = generation.tokens[index * size : (index + 1) * size]
            states = page_of(model, tokens)
            assert len(states) == size * STATE_BYTES
            if self._watched.page(page) != states:
                self._complain(f"I5: {name} goes on from KV of other tokens in its page {index}")
            for_whom = self._watched.computed_for.get(page, generation.request.namespace)
            if for_whom != generation.request.namespace:
                self._complain(f"I10: {name} goes on from another tenant's KV in its page {index}")
            self.verified_pages += 1
