"""Pages that arrive: checked off the event loop, and nobody else's before a thread is done."""

from __future__ import annotations

import threading

import anyio
import pytest

from workers.engines.port import PageMeta
from workers.kv import pages as kv_pages
from workers.kv.pages import IncomingPages, checksum
from workers.kv.prefix_cache import PrefixCache

pytestmark = pytest.mark.anyio
HASHES = [bytes([index]) * 16 for index in range(6)]
PAGE_BYTES = 64


class SlowMemory:
    """Pages whose writing takes until a test allows it."""

    blocking = True
    page_bytes = PAGE_BYTES

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}
        self.writing = threading.Event()
        self.may_write = threading.Event()
        self.threads: set[int] = set()

    def read(self, page: int) -> memoryview:
        return memoryview(self.contents[page])

    def write(self, page: int, raw: memoryview) -> None:
        self.threads.add(threading.get_ident())
        self.writing.set()
        assert self.may_write.wait(30)
        self.contents[page] = bytes(raw)


class Arriving:
    """A reservation for six pages whose bytes have come."""

    def __init__(self) -> None:
        self.memory = SlowMemory()
        self.cache = PrefixCache(8, lambda: 0.0)
        self.freed = 0
        self.pages = IncomingPages(self.memory, self.cache.reserve(HASHES, 0, 6), self._on_release)
        self.metas: list[PageMeta] = []
        for index, name in enumerate(HASHES):
            buffer = self.pages.buffer(index)
            buffer[:] = bytes([index + 1]) * PAGE_BYTES
            self.metas.append(PageMeta(name, checksum(buffer)))

    def _on_release(self) -> None:
        self.freed += 1

    async def write_begins(self) -> None:
        with anyio.fail_after(30):
            while not self.memory.writing.is_set():
                await anyio.lowlevel.checkpoint()


@pytest.fixture(autouse=True)
def pieces_of_two_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pages, "PIECE_BYTES", 2 * PAGE_BYTES)


async def test_the_event_loop_goes_on_while_pages_are_checked_in_pieces() -> None:
    it = Arriving()
    taken: list[int] = []

    async def commit() -> None:
        taken.append(await it.pages.commit(it.metas))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(commit)
        await it.write_begins()  # by the loop, while a thread is held up in the first write
        assert (len(it.memory.contents), it.cache.cached_pages) == (0, 0)
        it.memory.may_write.set()
    assert (taken, it.freed) == ([6], 1)
    assert threading.get_ident() not in it.memory.threads
    run = it.cache.match(HASHES)
    assert [it.memory.contents[page][0] for page in run] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", range(6))
async def test_nothing_from_a_wrong_page_on_is_written_or_named(bad: int) -> None:
    it = Arriving()
    it.memory.may_write.set()
    it.pages.buffer(bad)[3] ^= 1
    assert await it.pages.commit(it.metas) == bad
    assert len(it.cache.match(HASHES)) == bad == len(it.memory.contents)
    assert it.cache.free_pages == 8


async def test_a_cancelled_check_frees_its_pages_only_when_the_thread_has_ended() -> None:
    it = Arriving()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(it.pages.commit, it.metas)
        await it.write_begins()
        tasks.cancel_scope.cancel()
    it.pages.release()
    it.cache.check_integrity()
    assert (it.freed, it.cache.free_pages) == (0, 2), "a thread may still write to these pages"
    it.memory.may_write.set()
    with anyio.fail_after(30):
        while not it.freed:
            await anyio.lowlevel.checkpoint()
    it.pages.release()
    assert (it.freed, it.cache.free_pages, it.cache.cached_pages) == (1, 8, 0)
    with pytest.raises(ValueError, match="released"):
        await it.pages.commit(it.metas)
