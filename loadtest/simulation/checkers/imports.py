"""Watches what becomes of KV whose transfer broke, or that arrived with wrong bytes (P13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.engines.port import PageMeta
from workers.kv.pages import IncomingPages


class WatchedImport:
    """A PageImport that knows what happened on the way. ``on_refused`` is told once of an import
    that was spoilt and not used, ``complain`` of what was used though it was."""

    def __init__(
        self,
        inner: IncomingPages,
        on_refused: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self.broken = False
        """Its pull did not come to its end."""
        self.wrong_from: int | None = None
        """The first page that arrived with wrong bytes."""
        self._inner = inner
        self._on_refused = on_refused
        self._complain = complain
        self._taken = 0
        self._open = True

    @property
    def pages(self) -> Sequence[int]:
        """Where in the engine's memory its pages are to be."""
        return self._inner._reservation.pages

    def arrived_wrong(self, index: int) -> None:
        """This page has other bytes than were sent."""
        if self.wrong_from is None or index < self.wrong_from:
            self.wrong_from = index

    def buffer(self, index: int) -> memoryview:
        return self._inner.buffer(index)

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        self._taken = await self._inner.commit(pages)
        return self._taken

    def release(self) -> None:
        self._inner.release()
        if self._open:
            self._open = False
            self._judge()

    def _judge(self) -> None:
        if self.wrong_from is not None and self._taken > self.wrong_from:
            self._complain(f"P13: page {self.wrong_from} arrived with wrong bytes and is used")
        elif self.broken and self._taken:
            self._complain(f"P13: {self._taken} pages of a broken transfer are used")
        elif self.broken or self.wrong_from is not None:
            self._on_refused()
