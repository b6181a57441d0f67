"""Pins and reservations that are counted wrongly are named; right ones are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.simulation.checkers.pins import judged_pins
from workers.engines.paged import PagedEngine
from workers.engines.port import PagesExhausted
from workers.kv.prefix_cache import PrefixCache

NAMES = [b"a", b"b", b"c"]


class Pool:
    """A cache with three pages of one context, behind as much of an engine as pins need."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.cache = PrefixCache(4, lambda: self.now_s)
        parent: bytes | None = None
        held = []
        for page, name in zip(self.cache.allocate(3), NAMES, strict=True):
            held.append(self.cache.seal(page, name, parent, 0))
            parent = name
        self.cache.release(held)
        self.engine: Any = SimpleNamespace(_cache=self.cache)

    def pin(self, pin_id: str, count: int, ttl_s: float = 10.0) -> None:
        PagedEngine.pin(self.engine, pin_id, NAMES[:count], ttl_s)

    def unpin(self, pin_id: str) -> None:
        PagedEngine.unpin(self.engine, pin_id)


def test_right_counts_are_not_complained_of() -> None:
    pool, said = Pool(), list[str]()
    with judged_pins(said.append):
        pool.pin("s", 2)
        pool.pin("t", 3, ttl_s=1.0)
        assert pool.cache.pinned_pages == 3
        pool.now_s = 2.0
        assert pool.cache.pinned_pages == 2
        pool.pin("s", 3)
        pool.cache.release(pool.cache.allocate(2))  # evicts a pinned page
        assert pool.cache.pinned_pages == 2
        with pytest.raises(PagesExhausted):
            pool.cache.reserve([b"x"] * 5, 0, 5)
        pool.unpin("s")
        pool.unpin("s")
        assert pool.cache.pinned_pages == 0
    assert not said


def test_a_pin_released_twice_is_noticed() -> None:
    pool, said = Pool(), list[str]()
    with judged_pins(said.append):
        pool.pin("s", 2)
        again = pool.cache._pins["s"]
        pool.pin("t", 2)
        pool.unpin("s")
        pool.cache._pins["s"] = again
        pool.cache.unpin("s")
        assert pool.cache.pinned_pages == 0
    assert [what[:4] for what in said] == ["P12:"]


def test_a_block_whose_pins_are_counted_twice_is_noticed() -> None:
    pool, said = Pool(), list[str]()
    with judged_pins(said.append):
        pool.pin("s", 2)
        pool.cache._index[b"a"].pins += 1
        assert pool.cache.pinned_pages == 2
    assert [what[:4] for what in said] == ["P12:"]


def test_a_refused_reservation_that_keeps_pages_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def greedy(cache: PrefixCache, names: object, first: int, count: int) -> None:
        cache.allocate(1)
        raise PagesExhausted("too many")

    monkeypatch.setattr(PrefixCache, "reserve", greedy)
    pool, said = Pool(), list[str]()
    with judged_pins(said.append), pytest.raises(PagesExhausted):
        pool.cache.reserve(NAMES, 0, 3)
    assert said == ["P12: a refused reservation took 1 pages"]
