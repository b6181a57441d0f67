"""The sim engine's page memory."""

from __future__ import annotations


class SimMemory:
    """Implements :class:`workers.kv.pages.PageMemory`: ``capacity`` pages of ``page_bytes``."""

    blocking = False

    def __init__(self, capacity: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._bytes = memoryview(bytearray(capacity * page_bytes))

    def page(self, page: int) -> memoryview:
        """The page itself, to be written to."""
        return self._bytes[page * self.page_bytes : (page + 1) * self.page_bytes]

    def read(self, page: int) -> memoryview:
        return self.page(page).toreadonly()

    def write(self, page: int, raw: memoryview) -> None:
        self.page(page)[:] = raw
