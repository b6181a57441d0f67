"""Bookkeeping of a paged KV pool with a prefix cache: which page holds what, and which goes first.

Pure: pages are integers, no tensor and no clock of its own. An engine keeps the contents.

A page is exactly one of

* *free*;
* *open*: being filled by one generation, without a name yet;
* *reserved*: set aside for KV that comes from a peer;
* *cached*: sealed under its chained block hash, with the checksum taken at that moment. Cached
  pages may be referred to by any number of holders (generations, exports) and softly pinned.

The invariant that everything rests on: whoever holds a block holds all blocks before it. So a
resident block's ancestors are resident, an unreferenced block has only unreferenced descendants,
and evicting leaves only (least recently used first, softly pinned last) keeps every cached prefix
a prefix. After RadixAttention's leaf-first LRU, over flat hashes as in vLLM's prefix caching.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from workers.engines.port import PageMeta, PagesExhausted

MAX_PINS = 65_536
"""Soft pins at most; over it the one that expires first is given up."""


@dataclass(slots=True, eq=False)
class _Block:
    """A cached page. ``resident`` turns False when it is evicted; a later block of the same hash
    is another object, so pins that outlive an eviction cannot touch it."""

    page: int
    block_hash: bytes
    checksum: int
    parent: _Block | None
    children: int = 0
    refs: int = 0
    pins: int = 0
    last_used: int = 0
    dropped: bool = False
    """Free it as soon as nothing needs it; whoever wants it meanwhile resets this."""
    resident: bool = True

    @property
    def evictable(self) -> bool:
        return self.resident and self.refs == 0 and self.children == 0


@dataclass(slots=True, eq=False)
class _Pin:
    blocks: list[_Block]
    expires_at: float


class Reservation:
    """Pages for the blocks ``first_page …`` of one context, all or nothing (see
    :meth:`PrefixCache.reserve`). Holds the context's earlier blocks until released."""

    def __init__(
        self,
        cache: PrefixCache,
        pages: tuple[int, ...],
        block_hashes: tuple[bytes, ...],
        held: list[int],
        parent: bytes | None,
    ) -> None:
        self.pages = pages
        self.block_hashes = block_hashes
        self.held = held
        self._cache = cache
        self._parent = parent
        self._open = True

    def commit(self, sealed: Sequence[PageMeta]) -> int:
        """Caches the first pages under ``sealed``, as far as the block hashes are those reserved
        for, and releases everything else. The caller has verified the checksums. Returns how many
        were taken; a block that became resident meanwhile counts (its copy here is freed)."""
        if not self._open:
            raise ValueError("the reservation was released")
        taken = 0
        for expected, meta in zip(self.block_hashes, sealed, strict=False):
            if meta.block_hash != expected:
                break
            taken += 1
        self._finish()
        self._cache._cache_reserved(self.pages, sealed[:taken], self._parent)
        self._cache.release(self.held)
        return taken

    def release(self) -> None:
        """Gives the pages back. Idempotent; also after commit."""
        if self._open:
            self._finish()
            self._cache._cache_reserved(self.pages, (), self._parent)
            self._cache.release(self.held)

    def _finish(self) -> None:
        self._open = False
        del self._cache._reservations[self]


@dataclass(slots=True)
class PrefixCache:
    """Pages ``0 … capacity - 1``. ``clock`` gives monotonic seconds (for pins)."""

    capacity: int
    clock: Callable[[], float]
    max_pins: int = MAX_PINS
    _free: dict[int, None] = field(init=False)
    """An ordered set: the page freed last is taken first."""
    _open: set[int] = field(init=False, default_factory=set)
    _reservations: dict[Reservation, None] = field(init=False, default_factory=dict)
    _index: dict[bytes, _Block] = field(init=False, default_factory=dict)
    _by_page: dict[int, _Block] = field(init=False, default_factory=dict)
    _unreferenced: int = field(init=False, default=0)
    _pinned: int = field(init=False, default=0)
    _pins: dict[str, _Pin] = field(init=False, default_factory=dict)
    _expiries: list[tuple[float, int, str, _Pin]] = field(init=False, default_factory=list)
    _leaves: tuple[list[tuple[int, int, _Block]], list[tuple[int, int, _Block]]] = field(
        init=False, default_factory=lambda: ([], [])
    )
    """Heaps by last use of evictable blocks, unpinned and pinned. Entries go stale when a block
    changes; what is popped is checked (so every change only pushes)."""
    _ticks: itertools.count[int] = field(init=False, default_factory=itertools.count)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError("a pool needs at least one page")
        self._free = dict.fromkeys(range(self.capacity - 1, -1, -1))

    # -- reading ------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Pages that :meth:`allocate` can give: free ones and unreferenced cache."""
        return len(self._free) + self._unreferenced

    @property
    def cached_pages(self) -> int:
        return len(self._index)

    @property
    def pinned_pages(self) -> int:
        """Cached pages under at least one live pin."""
        self._expire_pins()
        return self._pinned

    def sealed_pages(self) -> list[int]:
        """Every cached page."""
        return list(self._by_page)

    def match(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Pages of the longest resident run of these blocks, from the first. Takes no reference
        and does not count as a use."""
        return [block.page for block in self._run(block_hashes)]

    def meta(self, page: int) -> PageMeta:
        """Name and checksum of a cached page; KeyError for another."""
        block = self._by_page[page]
        return PageMeta(block.block_hash, block.checksum)

    # -- pages of a generation ----------------------------------------------------------------

    def acquire(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Like :meth:`match`, and takes one reference on each page: none of them can be evicted
        until :meth:`release`. The first block begins a context (see :meth:`acquire_part`)."""
        return self._refer(self._run(block_hashes))

    def acquire_part(self, block_hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """For blocks that may begin in the middle of a context: the pages of the longest resident
        run, and all pages that were acquired for it, those of the blocks before it among them.
        The latter are to be released."""
        run = self._run(block_hashes)
        chain: list[_Block] = []
        block = run[0].parent if run else None
        while block is not None:
            chain.append(block)
            block = block.parent
        return [block.page for block in run], self._refer(chain[::-1] + run)

    def _refer(self, blocks: Sequence[_Block]) -> list[int]:
        for block in blocks:
            if block.refs == 0:
                self._unreferenced -= 1
            block.refs += 1
            block.dropped = False
        return [block.page for block in blocks]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """``count`` open pages, evicting cache if needed; neighbours, beginning behind the page
        ``after``, as far as these are free (runs of pages are read faster). Raises PagesExhausted,
        and then has changed nothing."""
        pages = self._take(count, after)
        self._open.update(pages)
        return pages

    def seal(self, page: int, block_hash: bytes, parent_hash: bytes | None, checksum: int) -> int:
        """Names a full open page, which becomes cached; its holder keeps its reference. If the
        block is resident already, ``page`` is freed and the reference moves to the resident page.
        Returns the page that the holder now holds. ``parent_hash`` (None for a context's first
        block) must be held by the caller."""
        self._open.remove(page)
        block = self._enter(page, block_hash, parent_hash, checksum)
        if block.refs == 0:
            self._unreferenced -= 1
        block.refs += 1
        return block.page

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference on each page (a generation drops all of its pages at once). Open
        pages become free, cached ones evictable when nobody else holds them. ValueError for a
        page that is not held."""
        tick = next(self._ticks)
        for page in pages:
            if page in self._open:
                self._open.remove(page)
                self._free[page] = None
                continue
            block = self._by_page.get(page)
            if block is None or block.refs == 0:
                raise ValueError(f"page {page} is not held")
            block.refs -= 1
            block.last_used = tick
            if block.refs == 0:
                self._unreferenced += 1
                self._push(block)

    # -- soft pins ----------------------------------------------------------------------------

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        """Pins the resident run of these blocks: they are evicted only after unpinned ones.
        Replaces an earlier pin of that id. Returns the pages pinned; pins nothing when it is 0."""
        self._expire_pins()
        run = self._run(block_hashes)
        for block in run:
            block.pins += 1
            block.dropped = False
            if block.pins == 1:
                self._pinned += 1
                self._push(block)
        self.unpin(pin_id)
        if not run:
            return 0
        while len(self._pins) >= self.max_pins:
            self._drop_first_expiring()
        pin = _Pin(run, self.clock() + ttl_s)
        self._pins[pin_id] = pin
        heapq.heappush(self._expiries, (pin.expires_at, next(self._ticks), pin_id, pin))
        return len(run)

    def unpin(self, pin_id: str) -> None:
        """Ends a pin; unknown ids are ignored."""
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            return
        for block in pin.blocks:
            if block.resident:
                block.pins -= 1
                if block.pins == 0:
                    self._pinned -= 1
                    self._push(block)
        if len(self._expiries) > 2 * len(self._pins) + 64:
            self._expiries = [e for e in self._expiries if self._pins.get(e[2]) is e[3]]
            heapq.heapify(self._expiries)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        """Frees those of the blocks that nothing else needs: no holder, no pin, no longer cached
        context behind them; others as soon as that is so, unless they are used or pinned before.
        Returns how many of the pages are free now."""
        self._expire_pins()
        free = len(self._free)
        for block in reversed(self._run(block_hashes)):
            if block.pins:
                break  # and so are its ancestors
            block.dropped = True
            self._push(block)
        return len(self._free) - free

    # -- incoming KV --------------------------------------------------------------------------

    def reserve(self, block_hashes: Sequence[bytes], first_page: int, count: int) -> Reservation:
        """Sets ``count`` pages aside for the blocks from ``first_page`` on of the context named by
        ``block_hashes``, evicting cache if needed, and holds the blocks before. Raises
        PagesExhausted (nothing is changed), or ValueError if an earlier block is not resident or
        the context has not that many blocks."""
        if first_page < 0 or count < 0 or first_page + count > len(block_hashes):
            raise ValueError(
                f"blocks [{first_page}, {first_page + count}) of {len(block_hashes)} asked for"
            )
        if len(self._run(block_hashes[:first_page])) < first_page:
            raise ValueError("the blocks before the reservation are not resident")
        held = self.acquire(block_hashes[:first_page])
        try:
            pages = self._take(count)
        except PagesExhausted:
            self.release(held)
            raise
        wanted = tuple(block_hashes[first_page : first_page + count])
        parent = block_hashes[first_page - 1] if first_page else None
        reservation = Reservation(self, tuple(pages), wanted, held, parent)
        self._reservations[reservation] = None
        return reservation

    def _cache_reserved(
        self, pages: Sequence[int], sealed: Sequence[PageMeta], parent: bytes | None
    ) -> None:
        """The first pages become cached as ``sealed``, the rest free."""
        tick = next(self._ticks)
        for page, meta in zip(pages, sealed, strict=False):
            block = self._enter(page, meta.block_hash, parent, meta.checksum)
            block.last_used = tick
            self._push(block)
            parent = meta.block_hash
        self._free.update(dict.fromkeys(pages[len(sealed) :]))

    # -- inside -------------------------------------------------------------------------------

    def _run(self, block_hashes: Sequence[bytes]) -> list[_Block]:
        run: list[_Block] = []
        for block_hash in block_hashes:
            block = self._index.get(block_hash)
            if block is None:
                break
            run.append(block)
        return run

    def _enter(
        self, page: int, block_hash: bytes, parent_hash: bytes | None, checksum: int
    ) -> _Block:
        """Caches ``page`` without a reference, or frees it and returns the resident block."""
        present = self._index.get(block_hash)
        if present is not None:
            present.dropped = False
            self._free[page] = None
            return present
        parent = None if parent_hash is None else self._index[parent_hash]
        block = _Block(page, block_hash, checksum, parent)
        if parent is not None:
            parent.children += 1
        self._index[block_hash] = self._by_page[page] = block
        self._unreferenced += 1
        return block

    def _take(self, count: int, after: int | None = None) -> list[int]:
        if count > self.free_pages:
            raise PagesExhausted(
                f"{count} KV pages asked for, {self.free_pages} of {self.capacity} can be freed"
            )
        self._expire_pins()
        while len(self._free) < count:
            self._evict(self._pop_leaf())
        pages: list[int] = []
        for _ in range(count):
            page = next(reversed(self._free)) if after is None else after + 1
            if page not in self._free:
                page = next(reversed(self._free))
            del self._free[page]
            pages.append(page)
            after = page
        return pages

    def _push(self, block: _Block) -> None:
        """Enters a block whose place among the leaves may have changed; frees a dropped one."""
        if not block.evictable:
            return
        if block.dropped:
            self._evict(block)
            return
        heap = self._leaves[block.pins > 0]
        heapq.heappush(heap, (block.last_used, next(self._ticks), block))
        if len(heap) > 4 * self.capacity + 64:
            live = {e[2].page: e for e in heap if self._is_current(e, block.pins > 0)}
            heap[:] = live.values()
            heapq.heapify(heap)

    @staticmethod
    def _is_current(entry: tuple[int, int, _Block], pinned: bool) -> bool:
        last_used, _, block = entry
        return block.evictable and (block.pins > 0) == pinned and block.last_used == last_used

    def _pop_leaf(self) -> _Block:
        for pinned in (False, True):
            heap = self._leaves[pinned]
            while heap:
                entry = heapq.heappop(heap)
                if self._is_current(entry, pinned):
                    return entry[2]
        raise AssertionError("unreferenced blocks are counted but none is a leaf")

    def _evict(self, block: _Block | None) -> None:
        """Frees the block, and those dropped before that were kept for it alone."""
        while block is not None:
            del self._index[block.block_hash], self._by_page[block.page]
            block.resident = False
            self._unreferenced -= 1
            if block.pins:
                self._pinned -= 1
            self._free[block.page] = None
            parent, block.parent = block.parent, None  # a pin that outlives it must not keep these
            if parent is not None:
                parent.children -= 1
                if not (parent.dropped and parent.evictable):
                    self._push(parent)
                    return
            block = parent

    def _expire_pins(self) -> None:
        now = self.clock()
        while self._expiries and self._expiries[0][0] <= now:
            self._drop_first_expiring()

    def _drop_first_expiring(self) -> None:
        _, _, pin_id, pin = heapq.heappop(self._expiries)
        if self._pins.get(pin_id) is pin:
            self.unpin(pin_id)

    # -- check --------------------------------------------------------------------------------

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raises AssertionError if the books do not balance. ``holders``: the pages of every
        holder but the reservations (generations and exports), to compare references with."""
        reserved = [page for r in self._reservations for page in r.pages]
        states = [*self._free, *self._open, *reserved, *self._by_page]
        assert sorted(states) == list(range(self.capacity)), "a page is lost or in two states"
        blocks = list(self._index.values())
        children: Counter[bytes] = Counter()
        held_below: Counter[bytes] = Counter()
        for block in blocks:
            assert block.resident
            assert self._by_page[block.page] is block
            if block.parent is not None:
                assert block.parent.resident, "a block outlived its prefix"
                children[block.parent.block_hash] += 1
                held_below[block.parent.block_hash] += block.refs
        for block in blocks:
            assert not (block.dropped and (block.pins or block.evictable)), "it should be free"
            assert block.children == children[block.block_hash]
            assert block.refs >= held_below[block.block_hash], "a holder lacks part of its prefix"
        self._check_counts(blocks)
        if holders is not None:
            prefixes = [reservation.held for reservation in self._reservations]
            held = Counter(page for pages in [*holders, *prefixes] for page in pages)
            expected = {b.page: b.refs for b in blocks if b.refs} | dict.fromkeys(self._open, 1)
            assert held == expected, f"held {held}, counted {expected}"

    def _check_counts(self, blocks: Sequence[_Block]) -> None:
        assert self._unreferenced == sum(block.refs == 0 for block in blocks)
        assert self._pinned == sum(block.pins > 0 for block in blocks)
        pins = Counter(id(b) for pin in self._pins.values() for b in pin.blocks if b.resident)
        assert pins == {id(b): b.pins for b in blocks if b.pins}
        for pinned in (False, True):
            listed = {e[2].page for e in self._leaves[pinned] if self._is_current(e, pinned)}
            leaves = {b.page for b in blocks if b.evictable and (b.pins > 0) == pinned}
            assert listed == leaves, "an evictable block cannot be found"
