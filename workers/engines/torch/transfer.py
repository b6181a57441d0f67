"""Pages that leave for a peer, and pages that arrive from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from workers.engines.port import PageMeta
from workers.engines.torch.kv_pool import KvPool, checksum
from workers.kv.prefix_cache import PrefixCache, Reservation


class TorchPageExport:
    """Holds pages by reference (see the port); ``on_release`` is told once."""

    def __init__(
        self,
        pool: KvPool,
        cache: PrefixCache,
        block_hashes: Sequence[bytes],
        on_release: Callable[[TorchPageExport], None],
    ) -> None:
        self._run, self.held = cache.acquire_part(block_hashes)
        self._metas = [cache.meta(page) for page in self._run]
        self._pool = pool
        self._cache = cache
        self._on_release = on_release
        self._open = True

    @property
    def pages(self) -> Sequence[PageMeta]:
        return self._metas

    def view(self, index: int) -> memoryview:
        if not self._open:
            raise ValueError("the export was released")
        return self._pool.read(self._run[index])

    def release(self) -> None:
        if self._open:
            self._open = False
            self._cache.release(self.held)
            self._on_release(self)


class TorchPageImport:
    """Pages arrive in a staging buffer in wire form; commit verifies and scatters them."""

    def __init__(
        self, pool: KvPool, reservation: Reservation, on_release: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._reservation = reservation
        self._on_release = on_release
        shape = (len(reservation.pages), pool.page_bytes)
        self._staging: torch.Tensor | None = torch.empty(shape, dtype=torch.uint8)

    def buffer(self, index: int) -> memoryview:
        staging = self._staged()
        if not 0 <= index < len(staging):
            raise IndexError(f"page {index} of {len(staging)} reserved")
        return staging[index].numpy().data

    def commit(self, pages: Sequence[PageMeta]) -> int:
        staging = self._staged()
        reservation = self._reservation
        if len(pages) > len(staging):
            raise ValueError(f"{len(pages)} pages for a reservation of {len(staging)}")
        verified = 0
        for page, expected, meta in zip(
            reservation.pages, reservation.block_hashes, pages, strict=False
        ):
            raw = staging[verified]
            if meta.block_hash != expected or checksum(raw.numpy().data) != meta.checksum:
                break
            self._pool.write(page, raw)
            verified += 1
        taken = reservation.commit(pages[:verified])
        self.release()
        return taken

    def release(self) -> None:
        if self._staging is not None:
            self._staging = None
            self._reservation.release()
            self._on_release()

    def _staged(self) -> torch.Tensor:
        if self._staging is None:
            raise ValueError("the import was committed or released")
        return self._staging
