"""The sim engine's page memory, and pages on their way out and in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash

from workers.engines.port import PageMeta
from workers.kv.prefix_cache import PrefixCache, Reservation


class PageMemory:
    """``capacity`` pages of ``page_bytes`` bytes each."""

    def __init__(self, capacity: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._bytes = memoryview(bytearray(capacity * page_bytes))

    def page(self, page: int) -> memoryview:
        return self._bytes[page * self.page_bytes : (page + 1) * self.page_bytes]

    def checksum(self, page: int) -> int:
        return xxhash.xxh3_64_intdigest(self.page(page))


class SimExport:
    """Implements :class:`workers.engines.port.PageExport`."""

    def __init__(
        self,
        cache: PrefixCache,
        memory: PageMemory,
        block_hashes: Sequence[bytes],
        released: Callable[[SimExport], None],
    ) -> None:
        self._run, self.held = cache.acquire_part(block_hashes)
        self._metas = tuple(cache.meta(page) for page in self._run)
        self._cache = cache
        self._memory = memory
        self._released = released
        self._open = True

    @property
    def pages(self) -> Sequence[PageMeta]:
        return self._metas

    def view(self, index: int) -> memoryview:
        if not self._open:
            raise ValueError("the export was released")
        return self._memory.page(self._run[index]).toreadonly()

    def release(self) -> None:
        if self._open:
            self._open = False
            self._cache.release(self.held)
            self._released(self)


class SimImport:
    """Implements :class:`workers.engines.port.PageImport`; buffers are the reserved pages
    themselves, which nothing can read before they are committed."""

    def __init__(
        self, memory: PageMemory, reservation: Reservation, released: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._reservation = reservation
        self._released = released

    def buffer(self, index: int) -> memoryview:
        if not 0 <= index < len(self._reservation.pages):
            raise IndexError(f"page {index} of {len(self._reservation.pages)} reserved pages")
        return self._memory.page(self._reservation.pages[index])

    def commit(self, pages: Sequence[PageMeta]) -> int:
        intact = 0
        for page, meta in zip(self._reservation.pages, pages, strict=False):
            if self._memory.checksum(page) != meta.checksum:
                break
            intact += 1
        taken = self._reservation.commit(pages[:intact])
        self._released()
        return taken

    def release(self) -> None:
        self._reservation.release()
        self._released()
