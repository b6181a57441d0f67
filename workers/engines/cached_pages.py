"""The part of the engine port that is about cached KV pages, over a pool whose books are kept here.

Whoever fills the pages (an engine's own steps, or another process) enters them in the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from workers.engines.port import EngineInfo, PageExport, PageImport
from workers.kv.blocks import block_hashes
from workers.kv.pages import HeldPages, IncomingPages, PageMemory, checksum
from workers.kv.prefix_cache import PrefixCache


class CachedPages(ABC):
    """Base of engines (see the port :class:`workers.engines.port.Engine`). A subclass calls
    :meth:`_keep_pages` before anything else is used."""

    def _keep_pages(
        self,
        info: EngineInfo,
        memory: PageMemory,
        clock: Callable[[], float],
        pages: int | None = None,
    ) -> None:
        """``clock`` gives monotonic seconds; pins expire by it. ``pages`` of the memory, if they
        are not those that the engine computes with."""
        self._info = info
        self._memory = memory
        self._cache = PrefixCache(info.capacity_pages if pages is None else pages, clock)
        self._exports: dict[HeldPages, None] = {}

    @abstractmethod
    def _pages_freed(self) -> None:
        """An export or a reservation was released: what waits for pages may go on."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    def block_hashes(self, namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
        info = self._info
        return block_hashes(info.kv_fingerprint, namespace, tokens, info.page_size, info.public)

    def resident_pages(self, block_hashes: Sequence[bytes]) -> int:
        return len(self._cache.match(block_hashes))

    def reusable_pages(self, block_hashes: Sequence[bytes]) -> int:
        return self.resident_pages(block_hashes)

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        return self._cache.pin(pin_id, block_hashes, ttl_s)

    def unpin(self, pin_id: str) -> None:
        self._cache.unpin(pin_id)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        return self._cache.drop(block_hashes)

    def export_pages(self, block_hashes: Sequence[bytes]) -> PageExport:
        export = HeldPages(self._memory, self._cache, block_hashes, self._forget_export)
        self._exports[export] = None
        return export

    def reserve_import(
        self, block_hashes: Sequence[bytes], first_page: int, pages: int
    ) -> PageImport:
        reservation = self._cache.reserve(block_hashes, first_page, pages)
        return IncomingPages(self._memory, reservation, self._pages_freed)

    def _forget_export(self, export: HeldPages) -> None:
        del self._exports[export]
        self._pages_freed()

    def _check_pages(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError if the books do not balance with these holders beside the exports,
        or if the bytes of a cached page are not those it was sealed with."""
        exported = [export.held for export in self._exports]
        self._cache.check_integrity([*holders, *exported])
        for page in self._cache.sealed_pages():
            assert checksum(self._memory.read(page)) == self._cache.meta(page).checksum, (
                f"page {page} was overwritten after it was sealed"
            )
