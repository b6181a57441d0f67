"""The page books against a dumb oracle that recounts everything, under random use."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from tests.support.nightly import examples
from workers.engines.port import PageMeta, PagesExhausted
from workers.kv.prefix_cache import PrefixCache, Reservation

CAPACITY = 7
PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map("".join)
"""Contexts: a path in a small tree; its block hashes are its prefixes."""


def hashes_of(path: str) -> list[bytes]:
    return [path[: i + 1].encode() for i in range(len(path))]


def parent_of(block_hash: bytes) -> bytes | None:
    return block_hash[:-1] or None


def checksum_of(block_hash: bytes) -> int:
    return int.from_bytes(block_hash, "little")


Reserved = tuple[str, int, Reservation]
"""Path, first reserved block, reservation."""


@dataclass
class Holder:
    """A generation (has open pages to fill) or an export (has none)."""

    path: str
    pages: list[int]
    sealed: int


@dataclass
class Oracle:
    """Resident blocks with the time of their last use; everything else is recounted."""

    used: dict[bytes, int] = field(default_factory=dict)
    open_pages: int = 0
    holders: list[list[bytes]] = field(default_factory=list)
    pins: dict[str, tuple[list[bytes], float]] = field(default_factory=dict)
    dropped: set[bytes] = field(default_factory=set)
    tick: int = 0

    def run(self, path: str) -> list[bytes]:
        found: list[bytes] = []
        for block_hash in hashes_of(path):
            if block_hash not in self.used:
                break
            found.append(block_hash)
        return found

    def held(self) -> set[bytes]:
        return {b for holder in self.holders for b in holder}

    def pinned(self) -> set[bytes]:
        return {b for blocks, _ in self.pins.values() for b in blocks}

    def leaves(self) -> list[bytes]:
        inner = {parent_of(b) for b in self.used}
        return [b for b in self.used if b not in inner and b not in self.held()]

    def evict(self, block_hash: bytes) -> None:
        del self.used[block_hash]
        self.dropped.discard(block_hash)
        for blocks, _ in self.pins.values():
            if block_hash in blocks:
                blocks.remove(block_hash)

    def free(self) -> int:
        return CAPACITY - self.open_pages - len(self.held() & self.used.keys())

    def take(self, count: int) -> bool:
        if count > self.free():
            return False
        while CAPACITY - self.open_pages - len(self.used) < count:
            pinned = self.pinned()
            self.evict(min(self.leaves(), key=lambda b: (b in pinned, self.used[b])))
            self.settle()
        self.open_pages += count
        return True

    def touch(self, blocks: list[bytes]) -> None:
        self.tick += 1
        for block_hash in blocks:
            self.used[block_hash] = self.tick
        self.settle()

    def settle(self) -> None:
        while let_go := self.dropped.intersection(self.leaves()):
            for block_hash in let_go:
                self.evict(block_hash)


class PrefixCacheMachine(RuleBasedStateMachine):
    generations: Bundle[Holder] = Bundle("generations")
    exports: Bundle[Holder] = Bundle("exports")
    reservations: Bundle[Reserved] = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cache = PrefixCache(CAPACITY, lambda: self.now)
        self.oracle = Oracle()
        self.contents: dict[int, bytes] = {}
        self.live: list[Holder] = []

    @rule(target=generations, path=PATHS)
    def start(self, path: str) -> Holder | MultipleResults[Holder]:
        expected = self.oracle.run(path)
        pages = self.cache.acquire(hashes_of(path))
        assert [self.contents[p] for p in pages] == expected
        self.oracle.holders.append(list(expected))
        self.oracle.dropped.difference_update(expected)
        fits = self.oracle.take(len(path) - len(pages))
        try:
            pages += self.cache.allocate(len(path) - len(pages))
        except PagesExhausted:
            assert not fits
            self.cache.release(pages)
            self.oracle.holders.remove(expected)
            self.oracle.touch(expected)
            return multiple()
        assert fits
        self.live.append(holder := Holder(path, pages, len(expected)))
        return holder

    @rule(generation=generations)
    def fill_a_page(self, generation: Holder) -> None:
        index = generation.sealed
        if generation not in self.live or index == len(generation.path):
            return
        block_hash = hashes_of(generation.path)[index]
        page = generation.pages[index]
        known = block_hash in self.oracle.used
        kept = self.cache.seal(page, block_hash, parent_of(block_hash), checksum_of(block_hash))
        assert (kept == page) != known
        if not known:
            self.contents[page] = block_hash
        generation.pages[index] = kept
        generation.sealed += 1
        held = hashes_of(generation.path)[:index]
        self.oracle.holders[self.oracle.holders.index(held)] = [*held, block_hash]
        self.oracle.open_pages -= 1
        self.oracle.used.setdefault(block_hash, 0)
        self.oracle.dropped.discard(block_hash)

    @rule(generation=consumes(generations))
    def finish(self, generation: Holder) -> None:
        self.cache.release(generation.pages)
        held = hashes_of(generation.path)[: generation.sealed]
        self.oracle.holders.remove(held)
        self.oracle.open_pages -= len(generation.path) - generation.sealed
        self.oracle.touch(held)
        self.live.remove(generation)

    @rule(target=exports, path=PATHS)
    def export(self, path: str) -> Holder:
        pages = self.cache.acquire(hashes_of(path))
        self.oracle.holders.append(run := self.oracle.run(path))
        self.oracle.dropped.difference_update(run)
        self.live.append(holder := Holder(path[: len(run)], pages, len(run)))
        return holder

    @rule(target=exports, path=PATHS, start=st.integers(0, 4))
    def export_part(self, path: str, start: int) -> Holder:
        wanted = hashes_of(path)[start:]
        resident = [b for b in wanted if b in self.oracle.used]  # a prefix of what is wanted
        run, pages = self.cache.acquire_part(wanted)
        assert [self.contents[p] for p in run] == resident
        held = hashes_of(path)[: start + len(resident)] if resident else []
        assert [self.contents[p] for p in pages] == held
        self.oracle.holders.append(held)
        self.oracle.dropped.difference_update(held)
        self.live.append(holder := Holder(path[: len(held)], pages, len(held)))
        return holder

    @rule(export=consumes(exports))
    def end_export(self, export: Holder) -> None:
        self.finish(export)

    @rule(pin_id=st.sampled_from("xyz"), path=PATHS, ttl_s=st.sampled_from([1.0, 5.0]))
    def pin(self, pin_id: str, path: str, ttl_s: float) -> None:
        run = self.oracle.run(path)
        assert self.cache.pin(pin_id, hashes_of(path), ttl_s) == len(run)
        self.oracle.pins[pin_id] = (run, self.now + ttl_s)
        self.oracle.dropped.difference_update(run)

    @rule(pin_id=st.sampled_from("xyz"))
    def unpin(self, pin_id: str) -> None:
        self.cache.unpin(pin_id)
        self.oracle.pins.pop(pin_id, None)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        live = {i: p for i, p in self.oracle.pins.items() if p[1] > self.now}
        self.oracle.pins = live

    @rule(path=PATHS)
    def drop(self, path: str) -> None:
        run, before = self.oracle.run(path), len(self.oracle.used)
        self.oracle.dropped.update(b for b in run if b not in self.oracle.pinned())
        self.oracle.settle()
        assert self.cache.drop(hashes_of(path)) == before - len(self.oracle.used)

    @rule(target=reservations, path=PATHS)
    def reserve(self, path: str) -> Reserved | MultipleResults[Reserved]:
        run = self.oracle.run(path)
        self.oracle.holders.append(run)
        self.oracle.dropped.difference_update(run)
        count = len(path) - len(run)
        fits = self.oracle.take(count)
        try:
            reservation = self.cache.reserve(hashes_of(path), len(run), count)
        except PagesExhausted:
            assert not fits
            self.oracle.holders.remove(run)
            self.oracle.touch(run)
            return multiple()
        assert fits
        return path, len(run), reservation

    @rule(reserved=consumes(reservations), good=st.integers(0, 5))
    def commit(self, reserved: Reserved, good: int) -> None:
        path, first, reservation = reserved
        wanted = hashes_of(path)[first:]
        sent = [PageMeta(b, checksum_of(b)) for b in wanted[:good]]
        if good < len(wanted):
            sent.append(PageMeta(b"wrong", 0))
        new = [i for i, b in enumerate(wanted[:good]) if b not in self.oracle.used]
        assert reservation.commit(sent) == min(good, len(wanted))
        reservation.release()
        for index in new:
            self.contents[reservation.pages[index]] = wanted[index]
        self.oracle.open_pages -= len(wanted)
        self.oracle.dropped.difference_update(wanted[:good])
        self.oracle.touch(wanted[:good])
        self._end(path[:first])

    @rule(reserved=consumes(reservations))
    def abandon(self, reserved: Reserved) -> None:
        path, first, reservation = reserved
        reservation.release()
        reservation.release()
        self.oracle.open_pages -= len(path) - first
        self._end(path[:first])

    def _end(self, path: str) -> None:
        self.oracle.holders.remove(hashes_of(path))
        self.oracle.touch(hashes_of(path))

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity([h.pages for h in self.live])

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        oracle = self.oracle
        assert self.cache.free_pages == oracle.free()
        assert self.cache.cached_pages == len(oracle.used)
        assert self.cache.pinned_pages == len(oracle.pinned())
        for block_hash in oracle.used:
            pages = self.cache.match(hashes_of(block_hash.decode()))
            assert [self.contents[p] for p in pages] == hashes_of(block_hash.decode())
            assert self.cache.meta(pages[-1]) == PageMeta(block_hash, checksum_of(block_hash))


PrefixCacheMachine.TestCase.settings = settings(
    max_examples=examples(150), stateful_step_count=40, deadline=None
)
TestPrefixCache = PrefixCacheMachine.TestCase


def filled(cache: PrefixCache, path: str) -> list[int]:
    """A finished generation over ``path``."""
    pages = cache.acquire(hashes_of(path))
    start = len(pages)
    pages += cache.allocate(len(path) - start)
    for i, block_hash in enumerate(hashes_of(path)[start:], start):
        pages[i] = cache.seal(pages[i], block_hash, parent_of(block_hash), 0)
    cache.release(pages)
    return pages


def test_eviction_takes_the_least_recent_leaf_and_keeps_prefixes() -> None:
    cache = PrefixCache(4, lambda: 0.0)
    filled(cache, "aa")
    filled(cache, "bb")
    filled(cache, "a")  # the root of the first chain is used again, its leaf is not
    cache.allocate(1)
    assert len(cache.match(hashes_of("aa"))) == 1
    assert len(cache.match(hashes_of("bb"))) == 2


def test_pinned_pages_go_last_and_yield() -> None:
    cache = PrefixCache(4, lambda: 0.0)
    filled(cache, "aa")
    filled(cache, "bb")
    assert cache.pin("p", hashes_of("aa"), 10.0) == 2
    held = cache.allocate(2)
    assert (len(cache.match(hashes_of("aa"))), len(cache.match(hashes_of("bb")))) == (2, 0)
    held += cache.allocate(2)
    assert cache.pinned_pages == 0
    cache.release(held)
    cache.check_integrity([])


def test_pins_are_bounded_and_the_first_to_expire_is_given_up() -> None:
    cache = PrefixCache(4, lambda: 0.0, max_pins=2)
    for path, ttl_s in (("a", 3.0), ("b", 1.0), ("aa", 2.0)):
        filled(cache, path)
        cache.pin(path, hashes_of(path), ttl_s)
    assert cache.pinned_pages == 2
    assert cache.drop(hashes_of("b")) == 1
    assert cache.drop(hashes_of("aa")) == 0


def test_pins_stay_bounded_when_one_is_renewed() -> None:
    cache = PrefixCache(8, lambda: 0.0, max_pins=2)
    for path, ttl_s in (("a", 1.0), ("a", 9.0), ("b", 2.0), ("c", 3.0)):
        filled(cache, path)
        cache.pin(path, hashes_of(path), ttl_s)
    assert cache.pinned_pages == 2
    assert cache.drop(hashes_of("b")) == 1, "the one that expires first is given up"


def test_releasing_a_page_twice_is_refused() -> None:
    cache = PrefixCache(2, lambda: 0.0)
    pages = cache.allocate(1)
    cache.release(pages)
    with pytest.raises(ValueError, match="not held"):
        cache.release(pages)


def test_a_reservation_needs_its_prefix() -> None:
    cache = PrefixCache(4, lambda: 0.0)
    with pytest.raises(ValueError, match="not resident"):
        cache.reserve(hashes_of("aab"), 1, 2)
    with pytest.raises(ValueError, match="asked for"):
        cache.reserve(hashes_of("aab"), 0, 4)


def test_a_long_chain_that_was_dropped_goes_with_its_last_holder() -> None:
    length = 5000
    cache = PrefixCache(length, lambda: 0.0)
    names = [i.to_bytes(4, "big") for i in range(length)]
    pages = cache.allocate(length)
    for i, name in enumerate(names):
        pages[i] = cache.seal(pages[i], name, names[i - 1] if i else None, 0)
    assert cache.drop(names) == 0
    assert len(cache.match(names)) == length
    cache.release(pages)
    assert cache.cached_pages == 0
    cache.check_integrity([])
