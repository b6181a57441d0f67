"""Hands out the replica's pages in host memory to sglang's scheduler processes.

Each connection has a thread that waits for questions; what touches the books runs on the event
loop's thread, like everything else of an engine. A process that goes away in the middle leaves
nothing behind: what it was filling or holding ends with its connection.
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

from workers.engines.sglang import page_wire
from workers.engines.sglang.fills import PageFills, Slot
from workers.engines.sglang.host_pages import HostPages
from workers.engines.sglang.keys import PageNames
from workers.kv.pages import checksum
from workers.kv.prefix_cache import PrefixCache

log = logging.getLogger(__name__)

LOOP_TIMEOUT_S = 5.0
"""A loop that does not answer within this is busier than a recomputation would be."""
MAX_CONNECTIONS = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PageFormat:
    """What the first of sglang's processes says of its pages."""

    page_bytes: int
    """Of a whole page: the parts of all ranks."""
    layout: str
    device_pages: int
    """Pages that the device has room for."""


@dataclass(slots=True)
class _Open:
    """What ends with a connection."""

    holds: set[int] = field(default_factory=set)
    fills: set[tuple[int, int]] = field(default_factory=set)
    """(fill, part)"""


class PageDesk:
    """``equip`` is asked for memory once the first process says what its pages are; it is called on
    the desk's threads, everything of the books on the event loop's."""

    def __init__(self, path: Path, equip: Callable[[PageFormat], HostPages]) -> None:
        """``path`` of the socket. What ``equip`` raises is told to the process, and kept as
        :attr:`refusal`."""
        self.path = path
        self.refusal: str | None = None
        """Why a process got no pages, if one did not: sglang cannot start then."""
        self._equip = equip
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        """Of the event loop's thread: callbacks would have that of the desk's threads."""
        self._memory: HostPages | None = None
        self._layout = ""
        self._parts = 1
        self._cache: PrefixCache | None = None
        self._fills: PageFills | None = None
        """None until pages are kept."""
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
        self._cache, self._fills = cache, PageFills(cache, names, self._parts)

    def close(self) -> None:
        """Ends every connection. Nobody may write to the pages any more. Idempotent."""
        self._closed = True
        _shut(self._listener)  # closing it would not wake the thread that accepts
        self._listener.close()
        for connection in list(self._connections):
            _shut(connection)
        if self._fills is not None:
            self._fills.close()
        for hold in list(self._holds):
            self._let_go(hold)
        self.path.unlink(missing_ok=True)

    def holders(self) -> list[list[int]]:
        """The pages of every holder, for a check of the books."""
        fills = [] if self._fills is None else self._fills.holders()
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
        opened = _Open()
        try:
            while (question := page_wire.receive(connection)) is not None:
                try:
                    answer = self._answer(question, opened)
                except Exception as error:
                    if not isinstance(error, KeyError | ValueError | TypeError | TimeoutError):
                        log.warning("a question about pages failed", exc_info=True)
                    answer = {"error": f"{type(error).__name__}: {error}"}
                page_wire.send(connection, answer)
                if question.get("op") == "hello" and "error" not in answer:
                    assert self._memory is not None
                    page_wire.send_file(connection, self._memory.descriptor)
        except (OSError, ValueError) as error:
            if not self._closed:
                log.warning("a process of sglang does not ask for pages any more: %s", error)
        finally:
            self._connections.pop(connection, None)
            connection.close()
            if not self._closed:
                self._soon(self._abandon, opened)

    def _answer(self, question: dict[str, Any], opened: _Open) -> dict[str, Any]:
        match question["op"]:
            case "hello":
                return self._hello(question)
            case "refuse":
                self.refusal = self.refusal or str(question["reason"])
                return {}
            case "count":
                return {"pages": self._on_loop(self._count, question["keys"])}
            case "hold":
                hold, pages = self._on_loop(self._hold, question["keys"])
                opened.holds.add(hold)
                return {"hold": hold, "pages": pages}
            case "release":
                opened.holds.discard(question["hold"])
                self._on_loop(self._let_go, question["hold"])
                return {}
            case "allocate":
                part = int(question["part"])
                fill, slots = self._on_loop(self._allocate, question["keys"], part)
                if slots:
                    opened.fills.add((fill, part))
                return {"fill": fill, "pages": [(slot.index, slot.page) for slot in slots]}
            case "seal":
                return self._seal(question["fill"], question["part"], opened)
        raise ValueError(f"unknown question {question['op']!r}")

    def _hello(self, question: dict[str, Any]) -> dict[str, Any]:
        parts, layout = question["parts"], question["layout"]
        page_bytes = parts * question["part_bytes"]
        try:
            with self._equipping:
                if self._memory is None:
                    pages = PageFormat(page_bytes, layout, question["device_pages"])
                    self._memory = self._equip(pages)
                    self._parts, self._layout = parts, layout
            memory = self._memory
            if (self._parts, memory.page_bytes, self._layout) != (parts, page_bytes, layout):
                raise ValueError(
                    "sglang's ranks have pages of different sizes or layouts: pp_size must divide "
                    f"the model's layers ({self._layout}, and {layout})"
                )
        except Exception as error:
            self.refusal = self.refusal or str(error)
            raise
        return {"pages": memory.pages}

    def _seal(self, number: int, part: int, opened: _Open) -> dict[str, Any]:
        complete = self._on_loop(self._has_written, number, part)
        opened.fills.discard((number, part))
        if complete is not None:
            assert self._memory is not None
            try:
                # Nobody writes to the pages: they are read here, not on the loop.
                sums = [checksum(self._memory.read(slot.page)) for slot in complete]
                self._on_loop(self._enter, number, sums)
            except Exception:
                self._soon(self._give_up, number)
                raise
        return {}

    def _soon(self, work: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all of the books with it
            self._loop.call_soon_threadsafe(work, *arguments, context=self._context)

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

    def _count(self, keys: list[str]) -> int:
        return 0 if self._fills is None else len(self._fills.resident(keys))

    def _hold(self, keys: list[str]) -> tuple[int, list[int]]:
        run = [] if self._fills is None else self._fills.resident(keys)
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

    def _allocate(self, keys: list[str], part: int) -> tuple[int, list[Slot]]:
        return (0, []) if self._fills is None else self._fills.allocate(keys, part)

    def _has_written(self, number: int, part: int) -> list[Slot] | None:
        if self._fills is None:
            raise KeyError(number)
        return self._fills.seal(number, part)

    def _enter(self, number: int, sums: list[int]) -> None:
        assert self._fills is not None
        self._fills.enter(number, sums)

    def _give_up(self, number: int) -> None:
        assert self._fills is not None
        self._fills.give_up(number)

    def _abandon(self, opened: _Open) -> None:
        for hold in sorted(opened.holds):
            self._let_go(hold)
        for number, part in sorted(opened.fills):
            assert self._fills is not None
            self._fills.give_up(number, part)


def _shut(connection: socket.socket) -> None:
    """Ends a connection under its thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
