"""Pages in host memory that sglang's processes map too."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


class HostPages:
    """A :class:`workers.kv.pages.PageMemory` of ``pages`` pages in ``/dev/shm``; memory is touched
    as pages are first filled. Other processes map :attr:`path` until :meth:`unlink`."""

    blocking = True

    def __init__(self, path: Path, pages: int, page_bytes: int) -> None:
        """Raises OSError if there is no room."""
        self.path = path
        self.page_bytes = page_bytes
        self.pages = pages
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, pages * page_bytes)
            self._memory = memoryview(mmap.mmap(descriptor, pages * page_bytes))
        finally:
            os.close(descriptor)

    def read(self, page: int) -> memoryview:
        start = page * self.page_bytes
        return self._memory[start : start + self.page_bytes].toreadonly()

    def write(self, page: int, raw: memoryview) -> None:
        start = page * self.page_bytes
        self._memory[start : start + self.page_bytes] = raw

    def unlink(self) -> None:
        """Nobody can map the pages any more; who has them mapped keeps them. Idempotent."""
        self.path.unlink(missing_ok=True)


class NoPages:
    """Where sglang's own storage moves the KV, there are no pages here."""

    page_bytes = 1
    blocking = False

    def read(self, page: int) -> memoryview:
        raise ValueError(f"page {page}: KV is not kept here")

    def write(self, page: int, raw: memoryview) -> None:
        raise ValueError(f"page {page}: KV is not kept here")
