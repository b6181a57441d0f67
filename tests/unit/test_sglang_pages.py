"""Pages in host memory as sglang's processes see them: names, the desk that hands them out, its
socket."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from workers.engines.sglang import page_wire
from workers.engines.sglang.host_pages import HostPages
from workers.engines.sglang.keys import ContextNames, PageNames
from workers.engines.sglang.page_desk import PageDesk, PageFormat
from workers.kv.blocks import block_hashes
from workers.kv.prefix_cache import PrefixCache

pytestmark = pytest.mark.anyio

where: ContextVar[str] = ContextVar("where", default="a thread")
SIZE = 4
PAGES = 8
PART_BYTES = 64
FINGERPRINT = b"kv"


def hash_pages(tokens: list[int], seed: str | None, size: int) -> list[str]:
    """A chain like sglang's."""
    keys: list[str] = []
    for start in range(0, len(tokens), size):
        seed = hashlib.sha256(f"{seed}{tokens[start : start + size]}".encode()).hexdigest()
        keys.append(seed)
    return keys


class Desk:
    """A desk with its books, and a process that asks it."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.parts = parts
        self.names = PageNames(64)
        self.cache = PrefixCache(PAGES, lambda: 0.0)
        self.desk = PageDesk(folder / "socket", partial(self._equip, folder))
        self.memory: HostPages | None = None

    def _equip(self, folder: Path, pages: PageFormat) -> HostPages:
        assert pages.device_pages == PAGES // 2
        self.memory = HostPages(folder, PAGES, pages.page_bytes)
        return self.memory

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.desk.path))
        return connection

    def context(self, tokens: list[int]) -> tuple[list[str], list[bytes]]:
        """sglang's keys and our names of a context whose request was handed in."""
        context = ContextNames(
            self.names,
            hash_pages,
            kv_fingerprint=FINGERPRINT,
            namespace=b"n",
            seed="n",
            page_size=SIZE,
        )
        context.extend(tokens[:3])
        context.extend(tokens[3:])
        whole = len(tokens) // SIZE * SIZE
        keys = hash_pages(tokens[:whole], "n", SIZE)
        return keys, block_hashes(FINGERPRINT, b"n", tokens, SIZE)

    async def store(self, connection: socket.socket, keys: list[str], part: int = 0) -> list[int]:
        """Writes what it is given pages for; returns the indices of those keys."""
        answer = await ask(connection, op="allocate", keys=keys, part=part)
        for index, page in answer["pages"]:
            self.fill(page, part, index)
        if answer["pages"]:
            await ask(connection, op="seal", fill=answer["fill"], part=part)
        return [index for index, _ in answer["pages"]]

    def fill(self, page: int, part: int, index: int) -> None:
        assert self.memory is not None
        start = page * self.memory.page_bytes + part * PART_BYTES
        self.memory._memory[start : start + PART_BYTES] = bytes([index + 1]) * PART_BYTES

    def check(self) -> None:
        self.cache.check_integrity(self.desk.holders())


async def ask(connection: socket.socket, **question: Any) -> dict[str, Any]:
    def exchange() -> dict[str, Any]:
        page_wire.send(connection, question)
        answer = page_wire.receive(connection)
        assert answer is not None
        return answer

    return await anyio.to_thread.run_sync(exchange)


def hello(parts: int) -> dict[str, Any]:
    return {
        "op": "hello",
        "part_bytes": PART_BYTES,
        "parts": parts,
        "layout": "float32",
        "device_pages": PAGES // 2,
    }


async def meet(desk: Desk, connection: socket.socket) -> int:
    """The first question; returns a descriptor of the pages."""
    answer = await ask(connection, **hello(desk.parts))
    assert answer == {"pages": PAGES}
    return page_wire.receive_file(connection)


@pytest.fixture(params=[1, 2])
async def desk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path, request.param)
    with desk.connect() as first:
        os.close(await meet(desk, first))
    desk.desk.open(desk.cache, desk.names)
    yield desk
    desk.desk.close()
    desk.check()
    assert desk.memory is not None
    desk.memory.close()


TOKENS = list(range(3 * SIZE + 1))


async def fill_all(desk: Desk, keys: list[str]) -> list[int]:
    """Every rank writes its part of the pages."""
    indices: list[int] = []
    for part in range(desk.parts):
        with desk.connect() as rank:
            indices = await desk.store(rank, keys, part)
    return indices


async def test_pages_that_sglang_writes_are_named_as_ours(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    assert await fill_all(desk, keys) == [0, 1, 2]
    pages = desk.cache.match(names)
    assert len(pages) == 3
    assert desk.memory is not None
    assert bytes(desk.memory.read(pages[2])) == b"\3" * PART_BYTES * desk.parts
    assert await fill_all(desk, keys) == []
    desk.check()


async def test_what_is_resident_can_be_counted_and_read(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    await fill_all(desk, keys[:2])
    with desk.connect() as rank:
        assert await ask(rank, op="count", keys=keys) == {"pages": 2}
        held = await ask(rank, op="hold", keys=keys)
        assert held["pages"] == desk.cache.match(names)
        assert desk.cache.free_pages == PAGES - 2
        await ask(rank, op="release", hold=held["hold"])
        assert desk.cache.free_pages == PAGES


async def test_a_page_that_nobody_asked_for_is_not_kept(desk: Desk) -> None:
    with desk.connect() as rank:
        unknown = hash_pages(list(range(SIZE)), "another", SIZE)
        assert await ask(rank, op="allocate", keys=unknown, part=0) == {"fill": 0, "pages": []}


async def test_a_page_whose_prefix_is_gone_is_not_kept(desk: Desk) -> None:
    keys, _ = desk.context(TOKENS)
    with desk.connect() as rank:
        assert (await ask(rank, op="allocate", keys=keys[1:], part=0))["pages"] == []


async def test_pages_end_where_the_room_does(desk: Desk) -> None:
    keys, names = desk.context(list(range((PAGES + 2) * SIZE)))
    assert await fill_all(desk, keys) == list(range(PAGES))
    assert len(desk.cache.match(names)) == PAGES


async def test_later_pages_of_a_context_hold_what_is_before_them(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    await fill_all(desk, keys[:2])
    with desk.connect() as rank:
        answer = await ask(rank, op="allocate", keys=keys[2:], part=0)
        assert desk.cache.free_pages == PAGES - 3
        assert answer["pages"][0][0] == 0
        desk.check()
    await until(lambda: desk.cache.free_pages == PAGES)
    assert len(desk.cache.match(names)) == 2


async def test_what_a_rank_was_doing_ends_with_its_connection(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    with desk.connect() as rank:
        assert len((await ask(rank, op="allocate", keys=keys, part=0))["pages"]) == 3
        assert desk.cache.free_pages == PAGES - 3
    await until(lambda: desk.cache.free_pages == PAGES)
    assert desk.cache.match(names) == []
    await fill_all(desk, keys[:1])
    with desk.connect() as rank:
        await ask(rank, op="hold", keys=keys)
        assert desk.cache.free_pages == PAGES - 1
    await until(lambda: desk.cache.free_pages == PAGES)


async def test_a_batch_goes_with_the_rank_that_does_not_write_it(desk: Desk) -> None:
    """And is kept as soon as every rank is there again."""
    keys, names = desk.context(TOKENS)
    with desk.connect() as first:
        await desk.store(first, keys[:2], part=0)
        if desk.parts == 1:
            return
        await desk.store(first, keys[2:], part=0)
        with desk.connect() as second:
            assert (await ask(second, op="allocate", keys=keys[:2], part=1))["pages"]
        await until(lambda: desk.cache.free_pages == PAGES)
        with desk.connect() as second:
            assert await desk.store(second, keys[2:], part=1) == []
    assert await fill_all(desk, keys) == [0, 1, 2]
    assert len(desk.cache.match(names)) == 3


async def test_a_rank_that_is_batches_ahead_loses_nothing(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    for part in range(desk.parts):
        with desk.connect() as rank:
            for key in keys:
                assert await desk.store(rank, [key], part) == [0]
    assert len(desk.cache.match(names)) == 3
    assert desk.cache.free_pages == PAGES


async def test_checksums_that_fail_give_the_pages_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(raw: memoryview) -> int:
        raise ValueError("unreadable")

    keys, _ = desk.context(TOKENS)
    monkeypatch.setattr("workers.engines.sglang.page_desk.checksum", fail)
    await fill_all(desk, keys)
    await until(lambda: desk.cache.free_pages == PAGES)


async def test_ranks_of_different_pages_are_refused(desk: Desk) -> None:
    with desk.connect() as rank:
        answer = await ask(rank, **{**hello(desk.parts), "part_bytes": PART_BYTES + 4})
        assert "pp_size must divide the model's layers" in answer["error"]
    assert desk.desk.refusal is not None
    assert "different sizes" in desk.desk.refusal


@pytest.mark.parametrize(
    "question",
    [
        {"op": "no such"},
        {"op": "seal", "fill": 99, "part": 0},
        {"op": "allocate", "keys": ["key"]},
        {"op": "allocate", "keys": ["key"], "part": 9},
        {"op": "count"},
        {"op": "count", "keys": 7},
        {},
    ],
)
async def test_a_wrong_question_is_answered_with_what_is_wrong(
    desk: Desk, question: dict[str, Any]
) -> None:
    with desk.connect() as rank:
        assert (await ask(rank, **question))["error"]
        assert await ask(rank, op="count", keys=[]) == {"pages": 0}


async def test_a_stream_that_breaks_off_ends_alone(desk: Desk) -> None:
    with desk.connect() as rank:
        rank.sendall(b"\xff\xff\xff\x7f")
        assert await anyio.to_thread.run_sync(rank.recv, 1) == b""
    with desk.connect() as rank:
        rank.sendall((100).to_bytes(4, "little") + b"half")
    with desk.connect() as rank:
        assert await ask(rank, op="count", keys=[]) == {"pages": 0}


async def test_a_closed_desk_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    desk = PageDesk(tmp_path / "socket", lambda pages: HostPages(tmp_path, 1, pages.page_bytes))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(desk.path))
        await ask(connection, op="count", keys=[])  # by now the next one is waited for
        mine = {t for t in threading.enumerate() if t.name == "sglang-pages"} - before
        assert len(mine) == 2
        desk.close()
        for thread in mine:
            await anyio.to_thread.run_sync(thread.join, 10.0)
            assert not thread.is_alive()


async def test_why_there_are_no_pages_is_told(tmp_path: Path) -> None:
    def refuse(pages: PageFormat) -> HostPages:
        raise ValueError(f"{pages.device_pages} pages are too many")

    desk = PageDesk(tmp_path / "socket", refuse)
    try:
        with socket.socket(socket.AF_UNIX) as rank:
            rank.connect(str(desk.path))
            assert desk.refusal is None
            assert "too many" in (await ask(rank, **hello(1)))["error"]
            assert await ask(rank, op="refuse", reason="a consequence") == {}
        assert desk.refusal == "4 pages are too many"
    finally:
        desk.close()


def test_pages_have_their_memory_before_they_are_used(tmp_path: Path) -> None:
    pages = HostPages(tmp_path, 3, 1 << 16)
    assert os.fstat(pages.descriptor).st_blocks * 512 >= 3 << 16
    assert list(tmp_path.iterdir()) == [], "it would outlive a process that is killed"
    pages.write(2, memoryview(b"x" * (1 << 16)))
    assert bytes(pages.read(2)) == b"x" * (1 << 16)
    pages.close()
    pages.close()


def test_pages_without_room_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"--shm-size.*host_memory_mb") as failed:
        HostPages(tmp_path, 3, 1 << 20)
    assert failed.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert os.listdir("/proc/self/fd") == before


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await anyio.sleep(0.005)  # the desk's threads are woken by the socket
    raise AssertionError("it never came true")


async def test_what_was_dropped_is_not_kept_until_a_request_has_it_again(desk: Desk) -> None:
    keys, names = desk.context(TOKENS)
    desk.names.forget(names[1:])
    assert await fill_all(desk, keys) == [0]
    desk.context(TOKENS)
    assert await fill_all(desk, keys) == [1, 2]


def test_names_are_bounded() -> None:
    names = PageNames(3)
    context = ContextNames(
        names, hash_pages, kv_fingerprint=b"", namespace=b"", seed=None, page_size=SIZE
    )
    context.extend(range(10 * SIZE))
    assert len(names) == 3
    keys = hash_pages(list(range(10 * SIZE)), None, SIZE)
    assert names.get(keys[0]) is None
    newest = names.get(keys[-1])
    assert newest is not None
    assert newest.block_hash == block_hashes(b"", b"", list(range(10 * SIZE)), SIZE)[-1]


async def test_the_books_are_kept_in_the_context_of_the_loop(tmp_path: Path) -> None:
    """Their clock may ask it which loop it is on."""
    seen: list[str] = []

    def clock() -> float:
        seen.append(where.get())
        return 0.0

    where.set("the loop")
    desk = Desk(tmp_path, 1)
    desk.cache.clock = clock
    with desk.connect() as rank:
        os.close(await meet(desk, rank))
        desk.desk.open(desk.cache, desk.names)
        keys, _ = desk.context(TOKENS)
        assert await desk.store(rank, keys) == [0, 1, 2]
    desk.desk.close()
    assert {*seen} == {"the loop"}
