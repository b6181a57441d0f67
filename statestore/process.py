"""The life of a server process: until it is told to stop, or until it is done by itself."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Callable
from functools import partial
from typing import Protocol

import anyio
from anyio.abc import TaskStatus

log = logging.getLogger(__name__)


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

        async def watch_signals() -> None:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    if stop.is_set():
                        tasks.cancel_scope.cancel()
                        return
                    log.info("signal %s: stopping", number.name)
                    stop.set()

        async def serve_to_the_end(*, task_status: TaskStatus[str]) -> None:
            await serve(stop=stop, task_status=task_status)
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch_signals, name="signals")
        announce(await tasks.start(serve_to_the_end))
