"""Hands out the replica's pages in host memory to sglang's scheduler processes.

Each connection has a thread that waits for questions; what touches the books runs on the event
loop's thread, like everything else of an engine. A process that goes away in the middle leaves
nothing behind: what it was filling or holding is released with its connection, or with its lease.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import itertools
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from workers.engines.port import PageMeta, PagesExhausted
from workers.engines.sglang import page_wire
from workers.engines.sglang.host_pages import HostPages
from workers.engines.sglang.keys import PageName, PageNames
from workers.kv.pages import checksum
from workers.kv.prefix_cache import PrefixCache

log = logging.getLogger(__name__)

LOOP_TIMEOUT_S = 5.0
"""A loop that does not answer within this is busier than a recomputation would be."""
MAX_CONNECTIONS = 256

T = TypeVar("T")


@dataclass(slots=True)
class _Fill:
    """Pages that sglang's ranks are writing to."""

    keys: tuple[str, ...]
    names: list[PageName]
    pages: list[tuple[int, int]]
    """(index of its key, page)"""
    held: list[int]
    """The context's earlier pages."""
    parts: set[int] = field(default_factory=set)
    """Ranks that have written theirs."""


class PageDesk:
    """``equip`` is asked for memory and books once the first process says how large a page is; it
    is called on the desk's threads, everything else of the books on the event loop's."""

    def __init__(self, path: Path, equip: Callable[[int, str], HostPages]) -> None:
        """``path`` of the socket. ``equip`` takes the bytes of a page and its layout."""
        self.path = path
        self._equip = equip
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        """Of the event loop's thread: callbacks would have that of the desk's threads."""
        self._memory: HostPages | None = None
        self._layout = ""
        self._parts = 1
        self._cache: PrefixCache | None = None
        self._names: PageNames | None = None
        self._fills: dict[int, _Fill] = {}
        self._holds: dict[int, list[int]] = {}
        self._ids = itertools.count(1)
        self._equipping = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(MAX_CONNECTIONS)
        self._connections: dict[socket.socket, None] = {}
        self._closed = False
        threading.Thread(target=self._accept, name="sglang-pages", daemon=True).start()

    def open(self, cache: PrefixCache, names: PageNames) -> None:
        """From now on pages are kept."""
        self._cache, self._names = cache, names

    def close(self) -> None:
        """Ends every connection. Idempotent."""
        self._closed = True
        self._listener.close()
        for connection in list(self._connections):
            _shut(connection)
        for fill in list(self._fills):
            self._give_up(fill)
        for hold in list(self._holds):
            self._let_go(hold)
        self.path.unlink(missing_ok=True)

    def holders(self) -> list[list[int]]:
        """The pages of every holder, for a check of the books."""
        fills = [[*fill.held, *(page for _, page in fill.pages)] for fill in self._fills.values()]
        return [*fills, *self._holds.values()]

    # -- on the desk's threads ----------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            if self._closed or len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                continue
            self._connections[connection] = None
            threading.Thread(
                target=self._serve, args=(connection,), name="sglang-pages", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        mine: set[int] = set()
        """Fills and holds of this connection."""
        try:
            while (question := page_wire.receive(connection)) is not None:
                try:
                    answer = self._answer(question, mine)
                except Exception as error:
                    if not isinstance(error, KeyError | ValueError | TypeError | TimeoutError):
                        log.warning("a question about pages failed", exc_info=True)
                    answer = {"error": f"{type(error).__name__}: {error}"}
                page_wire.send(connection, answer)
        except (OSError, ValueError) as error:
            if not self._closed:
                log.warning("a process of sglang does not ask for pages any more: %s", error)
        finally:
            self._connections.pop(connection, None)
            connection.close()
            if mine and not self._closed:
                self._loop.call_soon_threadsafe(self._abandon, mine, context=self._context)

    def _answer(self, question: dict[str, Any], mine: set[int]) -> dict[str, Any]:
        match question["op"]:
            case "hello":
                return self._hello(question)
            case "count":
                return {"pages": self._on_loop(self._count, question["keys"])}
            case "hold":
                hold, pages = self._on_loop(self._hold, question["keys"])
                mine.add(hold)
                return {"hold": hold, "pages": pages}
            case "release":
                mine.discard(question["hold"])
                self._on_loop(self._let_go, question["hold"])
                return {}
            case "allocate":
                number, fill = self._on_loop(self._allocate, question["keys"])
                if fill is not None:
                    mine.add(number)
                return {"fill": number, "pages": [] if fill is None else fill.pages}
            case "seal":
                return self._seal(question["fill"], question["part"], mine)
        raise ValueError(f"unknown question {question['op']!r}")

    def _hello(self, question: dict[str, Any]) -> dict[str, Any]:
        parts, page_bytes = question["parts"], question["parts"] * question["part_bytes"]
        with self._equipping:
            if self._memory is None:
                self._memory = self._equip(page_bytes, question["layout"])
                self._parts, self._layout = parts, question["layout"]
        memory = self._memory
        if (self._parts, memory.page_bytes, self._layout) != (
            parts,
            page_bytes,
            question["layout"],
        ):
            raise ValueError("ranks have pages of different sizes or layouts")
        return {"path": str(memory.path), "pages": memory.pages}

    def _seal(self, number: int, part: int, mine: set[int]) -> dict[str, Any]:
        complete = self._on_loop(self._has_written, number, part)
        mine.discard(number)
        if complete is not None:
            assert self._memory is not None
            # Nobody but this fill uses the pages: read them here, not on the loop.
            sums = [checksum(self._memory.read(page)) for _, page in complete.pages]
            self._on_loop(self._enter, number, sums)
        return {}

    def _on_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                done.set_result(work(*arguments))
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run, context=self._context)
        except RuntimeError as error:
            raise ConnectionError("the worker is closing") from error
        try:
            return done.result(LOOP_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            if done.cancel():
                raise
            return done.result()

    # -- on the event loop's thread -----------------------------------------------------------

    def _run(self, keys: list[str]) -> list[PageName]:
        """Names of the leading keys that are known and resident."""
        if self._cache is None or self._names is None:
            return []
        names: list[PageName] = []
        for key in keys:
            name = self._names.get(key)
            if name is None or not self._cache.match([name.block_hash]):
                break
            names.append(name)
        return names

    def _count(self, keys: list[str]) -> int:
        return len(self._run(keys))

    def _hold(self, keys: list[str]) -> tuple[int, list[int]]:
        run = self._run(keys)
        number = next(self._ids)
        pages: list[int] = []
        if run:
            assert self._cache is not None
            pages, held = self._cache.acquire_part([name.block_hash for name in run])
            self._holds[number] = held
        return number, pages

    def _let_go(self, number: int) -> None:
        held = self._holds.pop(number, None)
        if held is not None:
            assert self._cache is not None
            self._cache.release(held)

    def _allocate(self, keys: list[str]) -> tuple[int, _Fill | None]:
        """Open pages for those of the keys that are not resident, as far as there is room and
        their context's earlier pages are here."""
        wanted = tuple(keys)
        for number, fill in self._fills.items():
            if fill.keys == wanted:
                return number, fill  # another rank was first
        if self._cache is None or self._names is None:
            return 0, None
        present = len(self._run(keys))
        names: list[PageName] = []
        for key in keys[present:]:
            name = self._names.get(key)
            if name is None or (names and name.parent != names[-1].block_hash):
                break
            names.append(name)
        held: list[int] = []
        if names and names[0].parent is not None:
            run, held = self._cache.acquire_part([names[0].parent])
            if not run:
                return 0, None
        pages: list[tuple[int, int]] = []
        for index in range(len(names)):
            try:
                pages.append((present + index, self._cache.allocate(1)[0]))
            except PagesExhausted:
                break
        if not pages:
            self._cache.release(held)
            return 0, None
        number = next(self._ids)
        fill = self._fills[number] = _Fill(wanted, names[: len(pages)], pages, held)
        return number, fill

    def _has_written(self, number: int, part: int) -> _Fill | None:
        """The fill, once every rank has written to it."""
        fill = self._fills[number]
        fill.parts.add(part)
        return fill if len(fill.parts) == self._parts else None

    def _enter(self, number: int, sums: list[int]) -> None:
        fill = self._fills.pop(number, None)
        if fill is None:
            return  # given up meanwhile
        assert self._cache is not None
        pages = []
        for (_, page), name, xxh3 in zip(fill.pages, fill.names, sums, strict=True):
            meta = PageMeta(name.block_hash, xxh3)
            pages.append(self._cache.seal(page, meta.block_hash, name.parent, meta.checksum))
        self._cache.release([*fill.held, *pages])

    def _give_up(self, number: int) -> None:
        fill = self._fills.pop(number, None)
        if fill is not None:
            assert self._cache is not None
            self._cache.release([*fill.held, *(page for _, page in fill.pages)])

    def _abandon(self, numbers: set[int]) -> None:
        for number in numbers:
            self._give_up(number)
            self._let_go(number)


def _shut(connection: socket.socket) -> None:
    """Ends a connection under its thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
