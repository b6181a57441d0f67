"""Which pages sglang's ranks are given to fill, and what becomes of them: no threads, no bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from workers.engines.sglang import fills
from workers.engines.sglang.fills import PageFills
from workers.engines.sglang.keys import PageName, PageNames
from workers.kv.prefix_cache import PrefixCache

PAGES = 8


class Ranks:
    """Two ranks that write one context in batches of two pages."""

    def __init__(self, pages: int = PAGES) -> None:
        self.names = PageNames(100)
        self.cache = PrefixCache(pages, lambda: 0.0)
        self.fills = PageFills(self.cache, self.names, parts=2)
        self.others: list[int] = []
        """Pages of somebody else's."""
        self.hashes = [b"h%d" % index for index in range(pages + 4)]
        for index, block_hash in enumerate(self.hashes):
            parent = self.hashes[index - 1] if index else None
            self.names.note(self.keys[index], PageName(block_hash, parent))

    @property
    def keys(self) -> list[str]:
        return [f"key {index}" for index in range(len(self.hashes))]

    def batch(self, number: int) -> list[str]:
        return self.keys[2 * number : 2 * number + 2]

    def ask(self, batch: int, part: int) -> tuple[int, list[int]]:
        number, slots = self.fills.allocate(self.batch(batch), part)
        self.check()
        return number, [slot.page for slot in slots]

    def write(self, batch: int, part: int) -> list[int]:
        """The part's rank writes the batch; returns the pages that it was given."""
        number, pages = self.ask(batch, part)
        if pages:
            complete = self.fills.seal(number, part)
            self.check()
            if complete is not None:
                self.fills.enter(number, [slot.page for slot in complete])
                self.check()
        return pages

    @property
    def cached(self) -> int:
        return len(self.cache.match(self.hashes))

    def check(self) -> None:
        self.cache.check_integrity([*self.fills.holders(), self.others])


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.check()
    assert len(ranks.fills) == 0, "a decision is left over"
    assert ranks.cache.free_pages == PAGES, "a page is left over"


def test_ranks_write_to_the_same_pages(ranks: Ranks) -> None:
    pages = ranks.write(0, part=0)
    assert ranks.cached == 0
    assert ranks.write(0, part=1) == pages
    assert ranks.cache.match(ranks.hashes) == pages


def test_a_rank_may_be_batches_ahead_of_another(ranks: Ranks) -> None:
    ahead = [ranks.write(batch, part=0) for batch in range(3)]
    assert [len(pages) for pages in ahead] == [2, 2, 2]
    assert [ranks.write(batch, part=1) for batch in range(3)] == ahead
    assert ranks.cached == 6


def test_what_one_rank_was_refused_no_rank_is_given(ranks: Ranks) -> None:
    ranks.others = ranks.cache.allocate(PAGES)
    assert ranks.write(0, part=0) == []
    ranks.cache.release(ranks.others)
    ranks.others = []
    assert ranks.write(0, part=1) == []
    assert ranks.cached == 0
    for part in (0, 1):
        assert len(ranks.write(0, part)) == 2


def test_what_a_rank_passes_over_is_given_up(ranks: Ranks) -> None:
    """It broke off an operation, or was told to forget what it had to write."""
    ranks.write(0, part=0)
    ranks.write(1, part=0)
    assert ranks.write(1, part=1) == [], "its prefix is not written"
    assert len(ranks.fills) == 0
    for part in (0, 1):
        ranks.write(0, part)
    assert ranks.cached == 2


def test_a_batch_that_comes_again_is_another_fill(ranks: Ranks) -> None:
    first = ranks.write(0, part=0)
    again = ranks.write(0, part=0)
    assert not {*first} & {*again}
    assert ranks.write(0, part=1) == first
    assert ranks.cached == 2
    assert ranks.write(0, part=1) == again
    assert ranks.cache.match(ranks.hashes) == first


def test_pages_are_free_only_when_nobody_writes_to_them(ranks: Ranks) -> None:
    number, pages = ranks.ask(0, part=0)
    assert ranks.ask(0, part=1) == (number, pages)
    ranks.fills.give_up(number, part=0)
    ranks.check()
    assert ranks.cache.free_pages == PAGES - 2, "the other rank still writes to them"
    assert ranks.ask(1, part=0) == (0, []), "its prefix will not come"
    assert ranks.fills.seal(number, part=1) is None
    assert ranks.cache.free_pages == PAGES
    assert ranks.ask(1, part=1) == (0, [])


def test_a_rank_that_goes_after_it_wrote_takes_nothing_with_it(ranks: Ranks) -> None:
    number, pages = ranks.ask(0, part=0)
    assert ranks.fills.seal(number, part=0) is None
    assert ranks.write(0, part=1) == pages
    ranks.fills.give_up(number, part=0)
    assert ranks.cached == 2


def test_a_rank_that_comes_late_to_a_broken_fill_is_given_nothing(ranks: Ranks) -> None:
    number, _ = ranks.ask(0, part=0)
    ranks.fills.give_up(number, part=0)
    assert ranks.cache.free_pages == PAGES
    assert ranks.ask(0, part=1) == (0, [])


def test_checksums_that_cannot_be_had_give_the_pages_back(ranks: Ranks) -> None:
    ranks.write(0, part=0)
    number, _ = ranks.ask(0, part=1)
    assert ranks.fills.seal(number, part=1) is not None
    assert ranks.ask(1, part=0)[1]
    ranks.fills.give_up(number)
    assert ranks.ask(1, part=1) == (0, [])
    ranks.fills.enter(number, [1, 2])
    assert ranks.cached == 0
    for number in list(ranks.fills._pending):
        ranks.fills.give_up(number, part=0)


def test_a_batch_whose_prefix_is_entered_late_is_given_up(ranks: Ranks) -> None:
    ranks.write(0, part=0)
    first, _ = ranks.ask(0, part=1)
    complete = ranks.fills.seal(first, part=1)
    assert complete is not None
    for part in (0, 1):
        assert len(ranks.write(1, part)) == 2
    ranks.fills.enter(first, [1, 2])
    assert ranks.cached == 2


def test_what_was_forgotten_while_it_was_written_is_not_kept(ranks: Ranks) -> None:
    for batch in range(2):
        ranks.write(batch, part=0)
    ranks.names.forget(ranks.hashes[1:])
    for batch in range(2):
        ranks.write(batch, part=1)
    assert ranks.cached == 1


def test_a_part_that_is_none_of_the_ranks_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="part 2 of 2"):
        ranks.fills.allocate(ranks.batch(0), 2)
    number, _ = ranks.ask(0, part=0)
    with pytest.raises(KeyError):
        ranks.fills.seal(number, part=1)
    ranks.fills.close()


def test_no_more_than_a_share_of_the_pool_is_being_filled() -> None:
    ranks = Ranks(pages=20)
    given = [len(ranks.write(batch, part=0)) for batch in range(8)]
    assert given == [2] * 6 + [0] * 2
    for batch in range(8):
        ranks.write(batch, part=1)
    assert ranks.cached == 12
    assert len(ranks.fills) == 0


def test_the_oldest_decision_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fills, "MAX_PENDING", 3)
    ranks = Ranks()
    for _ in range(5):
        ranks.names.forget(ranks.hashes)  # nothing to write: a decision all the same
        ranks.ask(0, part=0)
    assert len(ranks.fills) == 3
    ranks.ask(1, part=1)
    ranks.ask(1, part=0)
    assert len(ranks.fills) == 0


@pytest.mark.parametrize("seed", range(40))
def test_whatever_ranks_do_no_page_is_lost_or_written_by_two(seed: int) -> None:
    rng = random.Random(seed)
    ranks = Ranks()
    at = [0, 0]
    """The next batch of each rank: both write the same ones in the same order, over and over."""
    busy: list[tuple[int, list[int]] | None] = [None, None]
    sums: list[tuple[int, int]] = []
    kept = 0
    for _ in range(400):
        part = rng.randrange(2)
        doing = busy[part]
        if doing is None:
            batch, at[part] = at[part] % 6, at[part] + 1
            if rng.random() < 0.1:
                continue  # passed over
            number, pages = ranks.ask(batch, part)
            busy[part] = (number, pages) if pages else None
        elif rng.random() < 0.1:
            ranks.fills.give_up(doing[0], part)
            busy[part] = None
        else:
            complete = ranks.fills.seal(doing[0], part)
            if complete is not None:
                sums.append((doing[0], len(complete)))
            busy[part] = None
        if sums and rng.random() < 0.7:
            number, count = sums.pop(0)
            before = ranks.cache.cached_pages
            ranks.fills.enter(number, [7] * count)
            kept += ranks.cache.cached_pages - before
        if rng.random() < 0.1:
            ranks.cache.drop(ranks.hashes)
        ranks.check()
        being_written = {page for doing in busy if doing is not None for page in doing[1]}
        filled = [{slot.page for slot in f.slots} for f in ranks.fills._pending.values()]
        assert being_written <= set().union(*filled), "a page is written that is not a fill's"
    assert kept > 0
    for part, doing in enumerate(busy):
        if doing is not None:
            ranks.fills.give_up(doing[0], part)
    for number, count in sums:
        ranks.fills.enter(number, [7] * count)
    for part in (0, 1):
        ranks.ask(5, part)
    ranks.fills.close()
    ranks.check()
    assert ranks.cache.free_pages == PAGES
