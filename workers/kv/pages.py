"""KV pages on their way to a peer and from one, whatever memory an engine keeps them in."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol

import xxhash

from workers.engines.port import PageMeta
from workers.kv.prefix_cache import PrefixCache, Reservation

PIECE_BYTES = 4 << 20
"""Pages are checked in pieces of about this size: a few milliseconds each."""


class PageMemory(Protocol):
    """An engine's pages as bytes, by number. Any thread may read a page that nobody writes to, and
    write to a page that nobody else uses."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def blocking(self) -> bool:
        """Reading and writing take so long that the event loop should not wait for them."""
        ...

    def read(self, page: int) -> memoryview:
        """The page in wire form, read-only: the memory itself or a copy."""
        ...

    def write(self, page: int, raw: memoryview) -> None:
        """Fills the page from ``page_bytes`` bytes in wire form."""
        ...


def checksum(raw: memoryview) -> int:
    """xxh3-64 of a page in wire form."""
    return xxhash.xxh3_64_intdigest(raw)


class HeldPages:
    """Implements :class:`workers.engines.port.PageExport`; ``on_release`` is told once."""

    def __init__(
        self,
        memory: PageMemory,
        cache: PrefixCache,
        block_hashes: Sequence[bytes],
        on_release: Callable[[HeldPages], None],
    ) -> None:
        self._run, self.held = cache.acquire_part(block_hashes)
        self._metas = [cache.meta(page) for page in self._run]
        self._memory = memory
        self._cache = cache
        self._on_release = on_release
        self._open = True

    @property
    def pages(self) -> Sequence[PageMeta]:
        return self._metas

    def view(self, index: int) -> memoryview:
        if not self._open:
            raise ValueError("the export was released")
        return self._memory.read(self._run[index])

    def release(self) -> None:
        if self._open:
            self._open = False
            self._cache.release(self.held)
            self._on_release(self)


class IncomingPages:
    """Implements :class:`workers.engines.port.PageImport`. Pages arrive in a buffer beside the
    pool; what :meth:`commit` has verified is written to the pool and then named."""

    def __init__(
        self, memory: PageMemory, reservation: Reservation, on_release: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._reservation = reservation
        self._on_release = on_release
        # Fresh pages of the kernel: nothing is touched before it is received.
        size = max(1, len(reservation.pages) * memory.page_bytes)
        self._arrived = memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._piece: asyncio.Future[int] | None = None
        self._open = True

    def buffer(self, index: int) -> memoryview:
        if not self._open:
            raise ValueError("the import was committed or released")
        if not 0 <= index < len(self._reservation.pages):
            raise IndexError(f"page {index} of {len(self._reservation.pages)} reserved")
        size = self._memory.page_bytes
        return self._arrived[index * size : (index + 1) * size]

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        reservation = self._reservation
        if not self._open:
            raise ValueError("the import was committed or released")
        if len(pages) > len(reservation.pages):
            raise ValueError(f"{len(pages)} pages for a reservation of {len(reservation.pages)}")
        step = max(1, PIECE_BYTES // self._memory.page_bytes)
        verified = 0
        for first in range(0, len(pages), step):
            piece = pages[first : first + step]
            if self._memory.blocking:
                loop = asyncio.get_running_loop()
                self._piece = loop.run_in_executor(None, self._take, first, piece)
                taken = await asyncio.shield(self._piece)
            else:
                taken = self._take(first, piece)
            verified += taken
            if taken < len(piece):
                break
        verified = reservation.commit(pages[:verified])
        self.release()
        return verified

    def release(self) -> None:
        if self._piece is not None and not self._piece.done():
            # A thread still writes to the pages: they are free when it has ended.
            self._piece.add_done_callback(lambda _: self.release())
        elif self._open:
            self._open = False
            self._arrived = self._arrived[:0]
            self._reservation.release()
            self._on_release()

    def _take(self, first: int, pages: Sequence[PageMeta]) -> int:
        """Writes the pages from index ``first`` on to the pool, up to the first whose bytes are not
        what they should be; returns how many. Their names are the reservation's to check."""
        for index, meta in enumerate(pages, first):
            raw = self.buffer(index)
            if checksum(raw) != meta.checksum:
                return index - first
            self._memory.write(self._reservation.pages[index], raw)
        return len(pages)
