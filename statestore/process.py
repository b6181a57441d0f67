"""The life of a server process: until it is told to stop, or until it is done by itself."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

import anyio
from anyio.abc import TaskStatus

log = logging.getLogger(__name__)

T = TypeVar("T")


class Server(Protocol):
    """Serves until ``stop`` is set or for as long as it wants; reports its address once it does."""

    async def __call__(self, *, stop: anyio.Event, task_status: TaskStatus[str]) -> None: ...


Announce = Callable[[str], None]
"""Tells whoever started the process the address at which it serves."""
PRINTED: Announce = partial(print, flush=True)


def run_process(serve: Server, announce: Announce = PRINTED) -> None:
    """Runs a server until SIGTERM, SIGINT or its own end; a second signal ends it at once. Raises
    what ``serve`` raises, in groups."""
    options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
    anyio.run(_run, serve, announce, backend_options=options)


async def _run(serve: Server, announce: Announce) -> None:
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:

        async def watch_signals(*, task_status: TaskStatus[None]) -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                task_status.started()
                async for number in signals:
                    if stop.is_set():
                        tasks.cancel_scope.cancel()
                        return
                    log.info("signal %s: stopping", number.name)
                    stop.set()

        await tasks.start(watch_signals, name="signals")
        await serve(stop=stop, task_status=_Announced(announce))
        tasks.cancel_scope.cancel()


class _Announced:
    """Passes an address on. A server that is stopped while it waits for its store has none."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce

    def started(self, value: str | None = None) -> None:
        assert value is not None, "a server reports where it serves"
        self._announce(value)


async def or_stopped(stop: anyio.Event, attempt: Callable[[], Awaitable[T]]) -> T | None:
    """What ``attempt`` returns; None if ``stop`` is set first, or was: then it is cancelled."""
    result: T | None = None
    async with anyio.create_task_group() as tasks:

        async def give_up() -> None:
            await stop.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(give_up, name="stop")
        result = await attempt()
        tasks.cancel_scope.cancel()
    return result
