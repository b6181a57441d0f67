"""The life of a server process: until it is told to stop, or until it is done by itself."""

from __future__ import annotations

import importlib.util
import logging
import signal
from typing import Protocol

import anyio
from anyio.abc import TaskStatus

log = logging.getLogger(__name__)


class Server(Protocol):
    """Serves until ``stop`` is set or for as long as it wants; reports its address once it does."""

    async def __call__(self, *, stop: anyio.Event, task_status: TaskStatus[str]) -> None: ...


def run_process(name: str, serve: Server) -> None:
    """Runs a server until SIGTERM, SIGINT or its own end; a second signal ends it at once. Prints
    "<name> on <address>" for whoever started it. Raises what ``serve`` raises, in groups."""
    options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
    anyio.run(_run, name, serve, backend_options=options)


async def _run(name: str, serve: Server) -> None:
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
        address = await tasks.start(serve_to_the_end)
        print(f"{name} on {address}", flush=True)  # noqa: T201
