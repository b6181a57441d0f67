"""The view of what sglang's own tiers hold, from its KV events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

from workers.engines.sglang_requests.events import ResidentView, in_order
from workers.kv.blocks import block_hashes

SIZE = 4
FINGERPRINT = b"kv"
TENANT = b"tenant"
TOKENS = list(range(4 * SIZE))
NAMES = block_hashes(FINGERPRINT, TENANT, TOKENS, SIZE)
HASHES = [101, 102, 103, 104]
"""As sglang calls the pages."""


def stored(
    first: int, last: int, *, medium: str = "GPU", salt: str | None = TENANT.hex()
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": HASHES[first:last],
        "parent_block_hash": HASHES[first - 1] if first else None,
        "token_ids": TOKENS[first * SIZE : last * SIZE],
        "block_size": SIZE,
        "medium": medium,
    }
    return event if salt is None else {**event, "cache_salt": salt}


def removed(*hashes: int, medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium}


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([0.0, events, 0])


class View:
    """A view, and the publisher with its buffer."""

    def __init__(self) -> None:
        self.view = ResidentView(FINGERPRINT, SIZE)
        self.buffer: list[tuple[int, bytes]] = []
        self.heard: list[tuple[int, bytes] | None] = []
        """None: the connection was lost."""
        self.asked: list[int] = []
        self._count = 0

    def publish(self, *events: dict[str, Any], heard: bool = True, kept: bool = True) -> None:
        batch_of_events = self._count, batch(*events)
        self._count += 1
        if kept:
            self.buffer.append(batch_of_events)
        if heard:
            self.heard.append(batch_of_events)

    def restart(self) -> None:
        """Another publisher takes its place."""
        self.buffer, self._count = [], 0

    def follow(self) -> ResidentView:
        """The view after everything that was heard."""

        async def published() -> AsyncIterator[tuple[int, bytes] | None]:
            for batch_of_events in self.heard:
                yield batch_of_events

        async def missed(first: int) -> list[tuple[int, bytes]]:
            self.asked.append(first)
            return [(number, payload) for number, payload in self.buffer if number >= first]

        async def take() -> None:
            self.view, self.asked = ResidentView(FINGERPRINT, SIZE), []
            async for one in in_order(published(), missed):
                self.view.take(one)

        anyio.run(take)
        return self.view

    @property
    def run(self) -> int:
        return self.follow().run(NAMES)


@pytest.fixture
def it() -> View:
    return View()


def test_stored_pages_are_resident_under_our_names(it: View) -> None:
    it.publish(stored(0, 2))
    it.publish(stored(2, 4))
    assert it.run == 4
    assert it.asked == []
    assert it.view.resyncs == 0


def test_a_page_is_gone_with_the_last_tier_that_holds_it(it: View) -> None:
    it.publish(stored(0, 3), stored(0, 3, medium="CPU_PINNED"))
    it.publish(removed(HASHES[2]))
    assert it.run == 3
    it.publish(removed(HASHES[2], medium="CPU_PINNED"), removed(HASHES[2]))
    assert it.run == 2


def test_the_same_page_stored_twice_is_removed_once(it: View) -> None:
    it.publish(stored(0, 1), stored(0, 1), removed(HASHES[0]))
    assert it.run == 0


def test_everything_is_gone_when_the_cache_is_cleared(it: View) -> None:
    it.publish(stored(0, 4), {"type": "AllBlocksCleared"})
    assert len(it.follow()) == 0


def test_pages_of_another_tenant_or_of_none_are_others(it: View) -> None:
    it.publish(stored(0, 2, salt=b"another".hex()), stored(0, 2, salt=None))
    assert it.run == 0


def test_what_was_missed_is_asked_for_again(it: View) -> None:
    it.publish(stored(0, 2))
    it.publish(stored(2, 3), heard=False)
    it.publish(removed(HASHES[1]), heard=False)
    it.publish(stored(3, 4))
    assert it.run == 1
    assert it.asked == [1]
    assert it.view.resyncs == 0


def test_what_cannot_be_had_again_makes_the_view_unknown_never_stale(it: View) -> None:
    it.publish(stored(0, 4))
    it.publish(removed(HASHES[1]), heard=False, kept=False)
    it.publish(stored(0, 1, medium="CPU_PINNED"))
    assert it.run == 1  # of page 1 nothing is known: it is not counted on
    assert it.view.resyncs == 1
    it.publish(stored(1, 2))
    assert it.run == 2


def test_a_gap_in_what_is_sent_again_makes_the_view_unknown(it: View) -> None:
    it.publish(stored(0, 4))
    it.publish(removed(HASHES[0]), heard=False, kept=False)
    it.publish(stored(3, 4), heard=False)
    it.publish()
    assert it.run == 0
    assert it.view.resyncs == 1


def test_the_first_batches_may_have_been_missed_too(it: View) -> None:
    it.publish(stored(0, 2), heard=False)
    it.publish(stored(2, 4))
    assert it.run == 4
    assert it.asked == [0]


def test_another_publisher_begins_the_view_anew(it: View) -> None:
    it.publish(stored(0, 4))
    it.publish()
    it.restart()
    it.publish(stored(0, 2))
    assert it.run == 2
    assert it.view.resyncs == 1
    it.publish(removed(HASHES[1]), heard=False)
    it.publish()
    assert it.run == 1


def test_what_another_publisher_said_first_is_asked_for(it: View) -> None:
    it.publish(stored(0, 4))
    it.publish()
    it.publish()
    it.restart()
    it.publish(stored(0, 1), heard=False)
    it.publish(stored(1, 2))
    assert it.run == 2
    assert it.asked == [0]


def test_after_a_lost_connection_nothing_is_known_but_what_can_be_had_again(it: View) -> None:
    it.publish(stored(0, 2))
    it.heard.append(None)
    assert it.run == 0
    it.publish(stored(2, 3))
    assert it.run == 3
    it.buffer.clear()
    assert it.run == 0
    it.publish(stored(0, 1))
    assert it.run == 1


def test_another_publisher_that_has_counted_as_far_is_told_by_its_connection(it: View) -> None:
    it.publish(stored(0, 4))
    it.restart()
    it.heard.append(None)
    it.publish(heard=False, kept=False)
    it.publish(stored(0, 1))
    assert it.run == 1


def test_of_what_is_sent_again_the_end_is_taken_if_the_beginning_is_gone(it: View) -> None:
    it.publish(removed(HASHES[0]), heard=False, kept=False)
    it.publish(stored(0, 2), heard=False)
    it.publish(stored(2, 3))
    assert it.run == 3
    assert it.view.resyncs == 1


@pytest.mark.parametrize(
    "unreadable",
    [
        b"\xc1",
        msgspec.msgpack.encode({}),
        batch({"type": "BlockRemoved"}),
        batch({"type": "BlockStored", "token_ids": 3, "block_size": SIZE, "cache_salt": "00"}),
    ],
)
def test_a_batch_that_cannot_be_read_makes_the_view_unknown(it: View, unreadable: bytes) -> None:
    it.publish(stored(0, 4))
    view = it.follow()
    view.take(unreadable)
    assert (view.run(NAMES), view.resyncs) == (0, 1)
    view.take(batch(stored(0, 1)))
    assert view.run(NAMES) == 1


def test_pages_of_token_pairs_are_passed_over(it: View) -> None:
    """Speculative decoding caches them."""
    pairs = {**stored(0, 1), "token_ids": [(token, token + 1) for token in TOKENS[:SIZE]]}
    it.publish(stored(0, 2, medium="CPU_PINNED"))
    it.publish(pairs, {**pairs, "block_hashes": [201]}, stored(2, 3))
    assert it.run == 3
    assert it.view.resyncs == 0


def test_pages_whose_beginning_is_unknown_are_passed_over(it: View) -> None:
    it.publish(stored(2, 4))
    it.publish(removed(HASHES[3]))
    assert len(it.follow()) == 0


def test_what_is_dropped_is_not_counted_on_any_more(it: View) -> None:
    it.publish(stored(0, 4))
    view = it.follow()
    view.forget(NAMES[1:])
    assert view.run(NAMES) == 1
    view.take(batch(removed(*HASHES)))
    assert view.run(NAMES) == 0
