"""A fleet of real processes on loopback: a store, gateways, workers, and proxies on every path.

A worker advertises another loopback address than the one it listens on; the proxies of its replica
service and of its KV channel listen there, on the same ports. So gateways and peers meet the
proxies without a setting that exists for tests only.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from tests.faults.children import Child, children
from tests.faults.engines import SIM, Hosted
from tests.faults.proxy import Proxy
from tests.faults.servers import Store, free_port

PIN_TTL_S = 5.0
PULL_TIMEOUT_S = 5.0
CLOCK_MARK = "the time is"
"""Before the wall clock, in the log of a process that got SIGUSR1."""


def faketime() -> Path | None:
    """libfaketime (Debian package faketime), if it is installed."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


class Node:
    """A gateway or worker: what stays the same over its processes."""

    def __init__(self, name: str, role: str, options: dict[str, Any], temporary: Path) -> None:
        self.name = name
        self.role = role
        self.options = options
        self.temporary = temporary
        """Where its processes have their temporary files."""
        temporary.mkdir()
        self.env: dict[str, str] = {"TMPDIR": str(temporary)}
        self.clock: Path | None = None
        """What its wall clock is set off by, if it can be."""
        self.child: Child | None = None

    @property
    def process(self) -> Child:
        assert self.child is not None
        return self.child

    @property
    def kv_port(self) -> int:
        """Of a worker's present process; its proxy has the same."""
        return int(self.options["kv_listen"].rpartition(":")[2])


class Fleet:
    """See the module's docstring."""

    def __init__(self, proxy: Proxy, store: Store, engine: Hosted, directory: Path) -> None:
        self.proxy = proxy
        self.engine = engine
        self.store = store
        self.directory = directory
        self.liveness: dict[str, float] = {}
        """What gateways have otherwise than by default."""
        self.nodes: dict[str, Node] = {}
        self.ended: list[Child] = []
        self.records: RedisStore
        """Without a proxy, for checks."""

    @property
    def raw(self) -> Any:
        return self.store.raw

    @property
    def workers(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.role == "worker"]

    @property
    def gateways(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.role == "gateway"]

    def children(self) -> list[Child]:
        """Every process so far, those of the store among them."""
        found = [*self.ended, *(n.child for n in self.nodes.values() if n.child is not None)]
        for server in self.store.servers:
            found += server.started
        return found

    def complaints(self) -> list[str]:
        """How processes ended that no test had ended, or ended not as they should; each once."""
        found: list[str] = []
        for child in self.children():
            child.judge_its_end()
            found += child.complaints
            child.complaints.clear()
        return found

    def add_gateway(self, name: str) -> Node:
        port = free_port()
        listen = f"127.0.0.1:{port}"
        self.proxy.add(f"client:{name}", ("127.0.0.1", 0), ("127.0.0.1", port))
        options = {"listen": listen, "gateway_id": name, "liveness": self.liveness}
        self.nodes[name] = Node(name, "gateway", options, self.directory / f"{name}.tmp")
        return self.nodes[name]

    def add_worker(self, name: str) -> Node:
        options = {
            "advertise_host": f"127.0.1.{1 + len(self.workers)}",
            "replica": {
                "replica_id": name,
                "pin_ttl_s": PIN_TTL_S,
                "pull_timeout_s": PULL_TIMEOUT_S,
            },
            "engine": self.engine.name,
            "engine_options": self.engine.options(self.directory),
        }
        self.nodes[name] = Node(name, "worker", options, self.directory / f"{name}.tmp")
        self.move(self.nodes[name])
        return self.nodes[name]

    def unclock(self, worker: Node) -> None:
        """The worker's next process takes its wall clock's offset from a file."""
        library = faketime()
        if library is None:
            raise RuntimeError("libfaketime is not installed (Debian package faketime)")
        worker.clock = self.directory / f"{worker.name}.clock"
        worker.clock.write_text("+0")
        worker.env |= {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(worker.clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def move(self, worker: Node) -> None:
        """The worker's next process listens on other ports: its last one may still be there."""
        for setting, kind in (("listen", "grpc"), ("kv_listen", "kv")):
            port = free_port()
            worker.options[setting] = f"127.0.0.1:{port}"
            address = worker.options["advertise_host"], port
            link = self.proxy.add(f"{kind}:{worker.name}", address, ("127.0.0.1", port))
            if kind == "kv":
                link.window_bytes = 4096

    async def start(self, node: Node) -> Child:
        """Starts a process of this node; the last one may still be there (stopped)."""
        options = {
            "role": node.role,
            "redis_url": self.store.url(self.proxy, node.name),
            **node.options,
        }
        command = [sys.executable, "-m", "tests.faults.child", json.dumps(options)]
        if node.child is not None:
            self.ended.append(node.child)
        log = self.directory / f"{node.name}.log"
        node.child = Child(node.name, command, log, {"PYTHONPATH": os.getcwd(), **node.env})
        await node.child.ready()
        return node.child

    def named(self, name: str) -> Node:
        return self.nodes[name]

    async def aclose(self) -> None:
        """Ends every process, workers first, and the store last."""
        ends = [node for node in self.workers if node.child is not None]
        ends += [node for node in self.gateways if node.child is not None]
        async with anyio.create_task_group() as tasks:
            for node in ends:
                tasks.start_soon(node.process.terminate)
        for child in self.ended:
            child.judge_its_end()
            if child.running:
                child.wake()
                child.kill()
            await child.ended()
        await self.store.aclose()


@asynccontextmanager
async def fleet(
    store: Store,
    *,
    engine: Hosted = SIM,
    workers: int = 3,
    gateways: int = 2,
    clocks: bool = False,
    patient: bool = False,
) -> AsyncIterator[Fleet]:
    """A running fleet. At the end no child of this process may be left. ``clocks``: those of the
    workers can be set. ``patient``: gateways do not replace a worker that only stands still for a
    moment, where the machine does other work too."""
    directory = Path(tempfile.mkdtemp(prefix="sessile-faults-"))
    before = set(children())
    try:
        async with anyio.create_task_group() as traffic:
            proxy = Proxy(traffic)
            built = Fleet(proxy, store, engine, directory)
            if patient:
                built.liveness = {"suspect_after_s": 3.0, "down_after_s": 4.0}
            try:
                await store.start(proxy, directory)
                built.records = RedisStore(await connect(store.url_for_checks))
                nodes = [built.add_worker(f"w{i + 1}") for i in range(workers)]
                for node in nodes if clocks else ():
                    built.unclock(node)
                nodes += [built.add_gateway(f"g{i + 1}") for i in range(gateways)]
                async with anyio.create_task_group() as starts:
                    for node in nodes:
                        starts.start_soon(built.start, node)
                yield built
            finally:
                with anyio.CancelScope(shield=True):
                    proxy.heal()
                    await built.aclose()
                    if hasattr(built, "records"):
                        await built.records.aclose()
            traffic.cancel_scope.cancel()
        left = set(children()) - before
        if left:
            raise AssertionError(f"processes were left behind: {sorted(left)}")
    finally:
        if os.environ.get("SESSILE_FAULTS_KEEP"):
            print(f"logs are in {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
