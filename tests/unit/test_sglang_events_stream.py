"""KV events over ZeroMQ, from a publisher that speaks as sglang's does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from tests.support.fake_kv_events import FakeKvEvents, fake_kv_events
from workers.engines.sglang_requests import events as events_module
from workers.engines.sglang_requests.events import follow_events

pytestmark = pytest.mark.anyio


class Listener:
    """What has come so far: the "n" of each event, and None for what was lost."""

    def __init__(self, folder: Path) -> None:
        self.events, self.replay = (f"ipc://{folder / name}" for name in ("events", "replay"))
        self.came: list[int | None] = []
        self._more = anyio.Event()

    async def listen(self, replay: str) -> None:
        async for batch in follow_events(self.events, replay):
            events = [] if batch is None else msgspec.msgpack.decode(batch)[1]
            self.came += [event["n"] for event in events] or [None]
            self._more.set()
            self._more = anyio.Event()

    async def until(self, *expected: int | None) -> None:
        with anyio.move_on_after(10):
            while len(self.came) < len(expected):
                await self._more.wait()
        assert self.came == [*expected]


@asynccontextmanager
async def heard(
    it: Listener, replay: str | None = None, kept: int = 100
) -> AsyncIterator[FakeKvEvents]:
    """A publisher that is listened to."""
    async with (
        fake_kv_events(it.events, it.replay, kept) as publisher,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(it.listen, it.replay if replay is None else replay)
        await publisher.heard()
        yield publisher
        tasks.cancel_scope.cancel()


@pytest.fixture
def it(tmp_path: Path) -> Listener:
    return Listener(tmp_path)


async def publish(publisher: FakeKvEvents, *numbers: int, lost: bool = False) -> None:
    for number in numbers:
        await publisher.publish({"n": number}, lost=lost)


async def test_events_come_as_they_are_published(it: Listener) -> None:
    async with heard(it) as publisher:
        await publish(publisher, 1, 2, 3)
        await it.until(1, 2, 3)
        assert publisher.asked == []


async def test_what_was_lost_on_the_way_is_asked_for_again(it: Listener) -> None:
    async with heard(it) as publisher:
        await publish(publisher, 1)
        await publish(publisher, 2, 3, lost=True)
        await publish(publisher, 4)
        await it.until(1, 2, 3, 4)
        assert publisher.asked == [1]


async def test_what_the_publisher_has_no_more_is_told_as_lost(it: Listener) -> None:
    async with heard(it, kept=2) as publisher:
        await publish(publisher, 1)
        await publish(publisher, 2, 3, lost=True)
        await publish(publisher, 4)
        await it.until(1, None, 3, 4)


async def test_without_anybody_to_ask_it_is_told_as_lost(it: Listener) -> None:
    async with heard(it, replay="") as publisher:
        await publish(publisher, 1)
        await publish(publisher, 2, lost=True)
        await publish(publisher, 3)
        await it.until(1, None, 3)


async def test_who_does_not_answer_is_not_waited_for_for_ever(
    it: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "REPLAY_TIMEOUT_MS", 10)
    async with heard(it, replay=f"{it.replay}-of-nobody") as publisher:
        await publish(publisher, 1, lost=True)
        await publish(publisher, 2)
        await it.until(None, 2)


async def test_an_answer_is_taken_only_so_far(
    it: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "MAX_REPLAYED", 1)
    async with heard(it) as publisher:
        await publish(publisher, 1, 2, 3, lost=True)
        await publish(publisher, 4)
        await it.until(1, None, 4)


async def test_a_publisher_that_begins_anew_is_heard_from_its_beginning(it: Listener) -> None:
    """It has counted further than the one before: only the lost connection tells."""
    async with anyio.create_task_group() as tasks:
        async with fake_kv_events(it.events, it.replay) as first:
            tasks.start_soon(it.listen, it.replay)
            await first.heard()
            await publish(first, 1)
            await it.until(1)
        await it.until(1, None)
        async with fake_kv_events(it.events, it.replay) as second:
            await publish(second, 5, 6)  # before anybody listens
            await second.heard()
            await publish(second, 7)
            await it.until(1, None, 5, 6, 7)
        tasks.cancel_scope.cancel()
