"""How fast the KV data channel is by itself: two processes on loopback, no engine.

    python -m loadtest.bench.kv_channel [--megabytes 256] [--runs 9] [--page-kib 720] [--uvloop]

Beside it runs what this machine reaches at best with one blocking stream between two processes
(``sendall`` and ``recv_into``), because absolute figures of a shared machine mean little. Nothing
is verified here: checksums belong to the engine's commit. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import anyio

from gateway.security.config import TlsConfig
from gateway.security.tls import Tls
from workers.engines.port import PageMeta
from workers.kv.channel import KvServer, pull_pages

LEASE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What one transfer moves, and under which event loop."""

    pages: int
    page_bytes: int
    uvloop: bool
    tls: TlsConfig | None = None
    """Of both sides; None: without TLS."""

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes


class Memory:
    """Pages as an export, and as a reservation."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._buffer = memoryview(bytearray(b"\xa5" * shape.total_bytes))

    @property
    def pages(self) -> Sequence[PageMeta]:
        return [PageMeta(index.to_bytes(16, "big"), 0) for index in range(self._shape.pages)]

    def view(self, index: int) -> memoryview:
        start = index * self._shape.page_bytes
        return self._buffer[start : start + self._shape.page_bytes]

    buffer = view

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        return len(pages)

    def release(self) -> None:
        """The pages live as long as the benchmark."""


async def _serve(shape: Shape, pipe: Connection) -> None:
    tls = Tls(shape.tls) if shape.tls is not None else None
    memory, server = Memory(shape), KvServer("127.0.0.1", 0, tls=tls)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.serve)
        pipe.send(server.endpoint)
        while await anyio.to_thread.run_sync(pipe.recv):
            pipe.send(server.issue_ticket(memory, LEASE_S))
        tasks.cancel_scope.cancel()


def _source(shape: Shape, pipe: Connection) -> None:
    anyio.run(_serve, shape, pipe, backend_options={"use_uvloop": shape.uvloop})


async def _pull(shape: Shape, pipe: Connection, runs: int) -> list[float]:
    memory, endpoint = Memory(shape), pipe.recv()
    tls = Tls(shape.tls) if shape.tls is not None else None
    seconds: list[float] = []
    for _ in range(runs):
        pipe.send(True)
        ticket = pipe.recv()
        start = time.perf_counter()
        await pull_pages(endpoint, ticket, memory, shape.pages, shape.page_bytes, LEASE_S, tls=tls)
        seconds.append(time.perf_counter() - start)
    pipe.send(False)
    return seconds


def _blocking_source(shape: Shape, pipe: Connection) -> None:
    memory = Memory(shape)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while pipe.recv():
            connection, _ = listener.accept()
            with connection:
                for index in range(shape.pages):
                    connection.sendall(memory.view(index))


def _blocking_pull(shape: Shape, pipe: Connection, runs: int) -> list[float]:
    memory, port = Memory(shape), pipe.recv()
    seconds: list[float] = []
    for _ in range(runs):
        pipe.send(True)
        start = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for index in range(shape.pages):
                view = memory.view(index)
                while view.nbytes:
                    view = view[connection.recv_into(view) :]
        seconds.append(time.perf_counter() - start)
    pipe.send(False)
    return seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """GB/s (10^9 bytes) over all runs after the first."""

    median: float
    worst: float
    best: float


def _rates(shape: Shape, seconds: Sequence[float]) -> Rates:
    rates = sorted(shape.total_bytes / taken / 1e9 for taken in seconds[1:])
    return Rates(*(round(rate, 3) for rate in (statistics.median(rates), rates[0], rates[-1])))


def measure(shape: Shape, runs: int, *, channel: bool) -> Rates:
    """``runs`` timed transfers between two processes, after one that warms up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    target = _source if channel else _blocking_source
    process = context.Process(target=target, args=(shape, theirs), daemon=True)
    process.start()
    try:
        if channel:
            seconds = anyio.run(
                _pull, shape, ours, runs + 1, backend_options={"use_uvloop": shape.uvloop}
            )
        else:
            seconds = _blocking_pull(shape, ours, runs + 1)
        process.join(10)
    finally:
        process.kill()
    return _rates(shape, seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--page-kib", type=int, default=720)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    page_bytes = options.page_kib * 1024
    shape = Shape(max(1, options.megabytes * 10**6 // page_bytes), page_bytes, options.uvloop)
    result = {
        "shape": asdict(shape),
        "runs": options.runs,
        "channel_gb_per_s": asdict(measure(shape, options.runs, channel=True)),
        "blocking_sockets_gb_per_s": asdict(measure(shape, options.runs, channel=False)),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
