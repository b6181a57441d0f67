"""Counts the soft pins on KV pages once more, and what a refused reservation left (P12).

Pins yield to reservations, and only to them while there is other cache: which pages a reservation
may take hangs on these counts. A count that is too low gives away the pages of sessions that will
be back at once; one that is too high keeps pages of sessions that are gone. So of every page cache
a second book is kept, in the plainest way: who pinned which pages until when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from workers.engines.paged import PagedEngine
from workers.engines.port import PagesExhausted
from workers.kv.prefix_cache import PrefixCache, Reservation


@dataclass(slots=True)
class _Pinned:
    """One pin. A page that was given to another block since is no longer pinned by it."""

    pages: dict[int, object]
    """Page -> the block that it held."""
    expires_at: float


@dataclass(slots=True)
class _Book:
    """Of one cache; held so that no other cache gets its identity."""

    cache: PrefixCache
    pins: dict[str, _Pinned] = field(default_factory=dict)
    latest_s: float = 0.0
    """The last time at which pins expired. Clocks differ: that of the cache's process may be ahead
    of whoever samples its load."""

    def pin(self, pin_id: str, pages: dict[int, object], ttl_s: float) -> None:
        self._expire()
        self.pins.pop(pin_id, None)
        if not pages:
            return
        while len(self.pins) >= self.cache.max_pins:
            del self.pins[min(self.pins, key=lambda name: self.pins[name].expires_at)]
        self.pins[pin_id] = _Pinned(pages, self.cache.clock() + ttl_s)

    def _expire(self) -> None:
        over = [name for name, pin in self.pins.items() if pin.expires_at <= self.latest_s]
        for name in over:
            del self.pins[name]

    def judge(self, told: int) -> str | None:
        """``told``: how many pages the cache says are pinned, after it let expire what had to."""
        self._expire()
        blocks = self.cache._by_page
        pinned = Counter(
            page
            for pin in self.pins.values()
            for page, block in pin.pages.items()
            if blocks.get(page) is block
        )
        counted = {page: block.pins for page, block in blocks.items() if block.pins}
        if told != len(pinned):
            return f"P12: {told} pages count as pinned, {len(pinned)} are"
        if counted != pinned:
            return f"P12: pins are counted as {counted}, they are {dict(pinned)}"
        return None


@contextmanager
def judged_pins(complain: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile the pins of every page cache are judged whenever they are counted, and reservations
    that are refused: all pages are set aside up front, or none."""
    books: dict[int, _Book] = {}
    pin, unpin = PagedEngine.pin, PagedEngine.unpin
    count, expire = vars(PrefixCache)["pinned_pages"], PrefixCache._expire_pins
    reserve = PrefixCache.reserve

    def book_of(cache: PrefixCache) -> _Book:
        return books.setdefault(id(cache), _Book(cache))

    def pinned(
        engine: PagedEngine, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float
    ) -> int:
        cache = engine._cache
        pages: dict[int, object] = {
            page: cache._by_page[page] for page in cache.match(block_hashes)
        }
        number = pin(engine, pin_id, block_hashes, ttl_s)
        book_of(cache).pin(pin_id, pages, ttl_s)
        if number != len(pages):
            complain(f"P12: a pin of {len(pages)} pages took {number}")
        return number

    def unpinned(engine: PagedEngine, pin_id: str) -> None:
        unpin(engine, pin_id)
        book_of(engine._cache).pins.pop(pin_id, None)

    def expired(cache: PrefixCache) -> None:
        book = book_of(cache)
        book.latest_s = max(book.latest_s, cache.clock())
        expire(cache)

    def counted(cache: PrefixCache) -> int:
        told = int(count.__get__(cache))
        wrong = book_of(cache).judge(told)
        if wrong is not None:
            complain(wrong)
        return told

    def reserved(
        cache: PrefixCache, block_hashes: Sequence[bytes], first_page: int, wanted: int
    ) -> Reservation:
        before = cache.free_pages
        try:
            return reserve(cache, block_hashes, first_page, wanted)
        except PagesExhausted:
            if cache.free_pages != before:
                complain(f"P12: a refused reservation took {before - cache.free_pages} pages")
            raise

    with (
        mock.patch.object(PagedEngine, "pin", pinned),
        mock.patch.object(PagedEngine, "unpin", unpinned),
        mock.patch.object(PrefixCache, "pinned_pages", property(counted)),
        mock.patch.object(PrefixCache, "_expire_pins", expired),
        mock.patch.object(PrefixCache, "reserve", reserved),
    ):
        yield
