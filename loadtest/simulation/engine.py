"""The sim engine as the simulation runs it: it can be disturbed, and its use of KV is watched.

Whenever a generation goes on from cached pages, what is in them is compared with the states of the
generation's own tokens (I5), and whether the pages were computed for the same tenant (I10).
Whenever a page is sent, what is in it is compared with the states of the tokens that its name
stands for, and it must be held by somebody: else it is right only because nobody has needed the
page yet (P13). What pages hold is recomputed from tokens by the model and a chain of names of its
own; the names that the code under test gives to pages say only which page it believes to send, and
its checksums play no part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from loadtest.simulation.checkers.imports import WatchedImport
from workers.engines.scheduling import Generation, Work
from workers.engines.sim.config import SimConfig
from workers.engines.sim.engine import SimEngine
from workers.engines.sim.memory import SimMemory
from workers.engines.sim.model import STATE_BYTES, Context
from workers.kv.pages import IncomingPages


def page_of(model: Context, tokens: Sequence[int]) -> bytes:
    """What a page of these tokens holds; ``model`` goes on behind them."""
    return b"".join(model.compute(token) for token in tokens)


def root_name(kv_fingerprint: bytes, namespace: bytes) -> bytes:
    """What the name of a context's first page is chained to."""
    return hashlib.blake2b(kv_fingerprint + namespace, digest_size=16, person=b"kv-root").digest()


def page_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page of these tokens behind the page named ``previous``, or the root."""
    packed = b"".join(token.to_bytes(4, "little") for token in tokens)
    return hashlib.blake2b(previous + packed, digest_size=16, person=b"kv-block").digest()


@dataclass(slots=True)
class _Reference:
    """What a correct engine has of one generation, as far as it was computed."""

    name: bytes
    """Of its last whole page."""
    model: Context = field(default_factory=Context)
    states: bytes = b""
    """Of the page that is not whole yet."""


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
    """``complain`` is told of violations, ``on_refused`` of each import that was spoilt on its way
    and not used."""

    def __init__(
        self,
        config: SimConfig,
        complain: Callable[[str], None],
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config, anyio.current_time)
        self._watched = WatchedMemory(config.capacity_pages, self.info.page_bytes)
        self._pages = self._memory = self._watched
        self._usual = config
        self._complain = complain
        self._on_refused = on_refused
        self.verified_pages = 0
        self._references: dict[Generation, _Reference] = {}
        self._states: dict[bytes, bytes] = {}
        """Name -> what a page of that name holds, of all pages computed here or sent here."""

    def slow_down(self, factor: float) -> None:
        """Steps take this many times as long as usual from now on; 1: as usual."""
        timing = replace(self._usual.timing, step_ms=self._usual.timing.step_ms * factor)
        self._config = replace(self._usual, timing=timing)

    def reserve_import(
        self, block_hashes: Sequence[bytes], first_page: int, pages: int
    ) -> WatchedImport:
        inner = super().reserve_import(block_hashes, first_page, pages)
        assert isinstance(inner, IncomingPages)
        return WatchedImport(inner, self._on_refused, self._complain)

    def page_arrives(
        self, source: WatchedEngine, export: Any, reservation: WatchedImport, index: int
    ) -> None:
        """A page is read from another replica, for a reservation here."""
        inner = getattr(export, "_export", export)
        page, target = inner._run[index], reservation.pages[index]
        name = inner.pages[index].block_hash
        states = source._states.get(name)
        if states is None:
            self._complain(f"P13: a page is sent under a name that no tokens have ({index})")
        else:
            self._states[name] = states
            if source._watched.page(page) != states:
                self._complain(
                    f"P13: a page is sent that does not hold what its name says ({index})"
                )
        if not source.holds(page):
            self._complain(f"P13: a page is sent that nobody holds ({index})")
        if source.info.kv_fingerprint != self.info.kv_fingerprint:
            self._complain("P14: KV of another model arrives")
        self._watched.arriving_for.pop(target, None)
        if page in source._watched.computed_for:
            self._watched.arriving_for[target] = source._watched.computed_for[page]

    def lacks(self, states: Sequence[bytes]) -> int:
        """How many of these pages' contents are cached nowhere here."""
        cached = {bytes(self._watched.page(page)) for page in self._cache.sealed_pages()}
        return sum(state not in cached for state in states)

    def holds(self, page: int) -> bool:
        """Whether this page is cached and referred to, so that it cannot be evicted; a soft pin
        does not keep it."""
        block = self._cache._by_page.get(page)
        return block is not None and block.refs > 0

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
            self._forget_ended()
            self._references[generation] = self._verify(work)
        context = super()._fill_pages(work)
        self._follow(self._references[generation], work)
        first, last = work.start // size, (work.start + work.count - 1) // size
        for page in generation.pages[first : last + 1]:
            self._watched.computed_for[page] = generation.request.namespace
        return context

    def _forget_ended(self) -> None:
        for generation in [it for it in self._references if it.ended]:
            del self._references[generation]

    def _follow(self, reference: _Reference, work: Work) -> None:
        """Computes once more what the engine has just computed."""
        size = self._info.page_size
        for position in range(work.start, work.start + work.count):
            reference.states += reference.model.compute(work.generation.tokens[position])
            if (position + 1) % size == 0:
                page = work.generation.tokens[position + 1 - size : position + 1]
                reference.name = page_name(reference.name, page)
                self._states[reference.name], reference.states = reference.states, b""

    def _verify(self, work: Work) -> _Reference:
        """Compares the cached pages that a generation goes on from with its tokens. Returns what a
        correct engine has of it then."""
        generation, size = work.generation, self._info.page_size
        name, namespace = generation.request.generation_id, generation.request.namespace
        reference = _Reference(root_name(self.info.kv_fingerprint, namespace))
        for index, page in enumerate(generation.pages[: work.start // size]):
            tokens = generation.tokens[index * size : (index + 1) * size]
            states = page_of(reference.model, tokens)
            reference.name = page_name(reference.name, tokens)
            assert len(states) == size * STATE_BYTES
            if self._watched.page(page) != states:
                self._complain(f"I5: {name} goes on from KV of other tokens in its page {index}")
            for_whom = self._watched.computed_for.get(page, namespace)
            if for_whom != namespace:
                self._complain(f"I10: {name} goes on from another tenant's KV in its page {index}")
            self.verified_pages += 1
        return reference
