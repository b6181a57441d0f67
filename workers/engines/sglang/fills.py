"""Pages that sglang's ranks are filling: who was given which, and what becomes of them.

Pure: pages are integers, ranks are the numbers of their parts of a page, nothing waits. sglang
writes its prefix cache in batches of page keys, and every rank writes its part of the same batches
in the same order (what it writes its ranks agree upon), but one may be many batches ahead of
another. So the first to ask for a batch decides for all: which pages it gets, or none. The decision
waits until every rank has asked for it, or has asked for a later one and so passed it over.

Invariants:

* a page is free again only when every rank that was given it has written its part or is gone, so
  nobody writes to a page that is somebody else's by now;
* a fill whose prefix is still being filled waits for that: it is kept if its prefix was;
* a decision is asked for once by each rank, so none outlives the slowest rank's next question.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.engines.port import PagesExhausted
from workers.engines.sglang.keys import PageName, PageNames
from workers.kv.prefix_cache import PrefixCache

MAX_PENDING = 1024
"""Batches that wait for the slowest rank; over it the oldest is given up."""
FILLING_SHARE = 0.5
"""Of the pool, how much may be in fills before no more are begun: what is cached counts too."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A page that is being filled."""

    index: int
    """Of its key in the batch."""
    page: int
    key: str
    name: PageName


@dataclass(slots=True, eq=False)
class _Fill:
    number: int
    batch: tuple[int, str]
    """Length and last key: keys are chained, so these name the batch."""
    slots: list[Slot]
    """Empty if nothing of it is to be kept."""
    held: list[int]
    """The context's earlier pages."""
    prefix: _Fill | None
    """Where the page before the first one is being filled."""
    asked: set[int] = field(default_factory=set)
    """Parts whose ranks know the decision, or passed it over."""
    writing: set[int] = field(default_factory=set)
    """Parts whose ranks may write to the pages."""
    written: set[int] = field(default_factory=set)
    broken: bool = False
    """Some rank will not write its part: the pages are freed when nobody writes to them."""


class PageFills:
    """Fills the pages of ``cache`` in ``parts`` parts; mutates it and nothing else."""

    def __init__(self, cache: PrefixCache, names: PageNames, parts: int) -> None:
        self._cache = cache
        self._names = names
        self._parts = parts
        self._pending: dict[int, _Fill] = {}
        """In the order in which they were decided."""
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Decisions that some rank has still to ask for, or to write."""
        return len(self._pending)

    def resident(self, keys: Sequence[str]) -> list[PageName]:
        """Names of the leading keys that are known and cached."""
        run: list[PageName] = []
        for key in keys:
            name = self._names.get(key)
            if name is None or not self._cache.match([name.block_hash]):
                break
            run.append(name)
        return run

    def allocate(self, keys: Sequence[str], part: int) -> tuple[int, list[Slot]]:
        """Number and pages of the fill in which this part's rank writes the batch; no pages if it
        is not to be written. ``keys`` follow each other in one context."""
        if not 0 <= part < self._parts:
            raise ValueError(f"part {part} of {self._parts}")
        if not keys:
            return 0, []
        batch = len(keys), keys[-1]
        fill = next(
            (f for f in self._pending.values() if f.batch == batch and part not in f.asked), None
        )
        if fill is None:
            fill = self._decide(keys, batch)
        for earlier in list(self._pending.values()):
            if earlier is fill:
                break
            if part not in earlier.asked:  # it was passed over
                earlier.asked.add(part)
                self._break(earlier)
        fill.asked.add(part)
        if fill.slots and not fill.broken:
            fill.writing.add(part)
            return fill.number, fill.slots
        self._settle(fill)
        return 0, []

    def seal(self, number: int, part: int) -> list[Slot] | None:
        """The part is written. Returns the pages once all parts are: their checksums are to be
        given to :meth:`enter`, and until then nobody writes to them. KeyError for a fill that this
        part was not given."""
        fill = self._pending.get(number)
        if fill is None or part not in fill.writing:
            raise KeyError(f"part {part} has no fill {number}")
        fill.writing.remove(part)
        fill.written.add(part)
        if not fill.broken and len(fill.written) == self._parts:
            return fill.slots
        self._settle(fill)
        return None

    def enter(self, number: int, checksums: Sequence[int]) -> None:
        """Caches the pages of a complete fill, up to the first whose name was forgotten meanwhile.
        Nothing happens if the fill was given up."""
        fill = self._pending.get(number)
        if fill is None or fill.broken:
            return
        if fill.prefix is not None:
            # Every rank seals the prefix first: one had its answer too late, and went on.
            self._break(fill)
            return
        del self._pending[number]
        kept: list[int] = []
        for slot, xxh3 in zip(fill.slots, checksums, strict=True):
            if self._names.get(slot.key) != slot.name:
                break
            name = slot.name
            kept.append(self._cache.seal(slot.page, name.block_hash, name.parent, xxh3))
        for child in list(self._pending.values()):
            if child.prefix is fill:
                child.prefix = None
                parent = child.slots[0].name.parent
                assert parent is not None
                child.held = self._cache.acquire_part([parent])[1]
                if not child.held:
                    self._break(child)
        rest = (slot.page for slot in fill.slots[len(kept) :])
        self._cache.release([*fill.held, *kept, *rest])

    def give_up(self, number: int, part: int | None = None) -> None:
        """A rank that was given the fill is gone (``part``), or its checksums cannot be had."""
        fill = self._pending.get(number)
        if fill is not None:
            if part is not None:
                fill.writing.discard(part)
            self._break(fill)

    def close(self) -> None:
        """Gives every fill up; nobody may be writing any more."""
        for fill in self._pending.values():
            self._free(fill)
        self._pending.clear()

    def holders(self) -> list[list[int]]:
        """The pages of every fill, for a check of the books."""
        return [[*f.held, *(slot.page for slot in f.slots)] for f in self._pending.values()]

    # -- inside -------------------------------------------------------------------------------

    def _decide(self, keys: Sequence[str], batch: tuple[int, str]) -> _Fill:
        """Pages for those of the keys that are not cached, as far as there is room and their
        context's earlier pages are here, or will be."""
        for oldest in list(self._pending.values()):
            if len(self._pending) < MAX_PENDING:
                break
            oldest.asked.update(range(self._parts))
            self._break(oldest)
        fill = _Fill(next(self._numbers), batch, [], [], None)
        self._pending[fill.number] = fill
        filling = sum(len(f.slots) for f in self._pending.values())
        if filling > FILLING_SHARE * self._cache.capacity:
            return fill
        present = len(self.resident(keys))
        names = self._chain(keys[present:])
        if not names:
            return fill
        parent = names[0].parent
        if parent is not None:
            fill.held = self._cache.acquire_part([parent])[1]
            fill.prefix = None if fill.held else self._filling(parent)
            if not fill.held and fill.prefix is None:
                return fill
        for index, name in enumerate(names, present):
            try:
                (page,) = self._cache.allocate(1)
            except PagesExhausted:
                break
            fill.slots.append(Slot(index, page, keys[index], name))
        if not fill.slots:
            self._free(fill)
        return fill

    def _chain(self, keys: Sequence[str]) -> list[PageName]:
        """Names of the leading keys that are known and follow each other."""
        names: list[PageName] = []
        for key in keys:
            name = self._names.get(key)
            if name is None or (names and name.parent != names[-1].block_hash):
                break
            names.append(name)
        return names

    def _filling(self, block_hash: bytes) -> _Fill | None:
        for fill in reversed(self._pending.values()):
            if not fill.broken and any(s.name.block_hash == block_hash for s in fill.slots):
                return fill
        return None

    def _break(self, fill: _Fill) -> None:
        if not fill.broken:
            fill.broken = True
            for child in list(self._pending.values()):
                if child.prefix is fill:
                    self._break(child)
        self._settle(fill)

    def _settle(self, fill: _Fill) -> None:
        """Frees what nobody writes to, and forgets a decision that every rank knows."""
        if fill.broken and not fill.writing:
            self._free(fill)
        if not fill.slots and len(fill.asked) == self._parts:
            self._pending.pop(fill.number, None)

    def _free(self, fill: _Fill) -> None:
        self._cache.release([*fill.held, *(slot.page for slot in fill.slots)])
        fill.slots, fill.held, fill.prefix = [], [], None
