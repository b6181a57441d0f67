"""A fleet of real processes on loopback: a store, gateways, workers, and proxies on every path.

A worker advertises another loopback address than the one it listens on; the proxies of its replica
service and of its KV channel listen there, on the same ports. So gateways and peers meet the
proxies without a setting that exists for tests only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from statestore.embedded import dies_with_parent
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.scripts import load_script, script_names
from tests.faults.proxy import Proxy
from tests.support.servers import redis_binary
from workers.engines.sim.config import SimConfig, SimTiming

START_TIMEOUT_S = 60.0
ENGINE = SimConfig(
    page_size=16,
    capacity_pages=4096,
    max_context_tokens=32_768,
    max_running=16,
    max_queued=16,
    eos_probability=1 / 400,
    timing=SimTiming(step_ms=15, max_prefill_tokens=512),
)
PIN_TTL_S = 5.0
PULL_TIMEOUT_S = 5.0
CLOCK_MARK = "the time is"
"""Before the wall clock, in the log of a process that got SIGUSR1."""


def faketime() -> Path | None:
    """libfaketime (Debian package faketime), if it is installed."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


class Child:
    """One process. It ends with this one, whatever happens."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.stopped = False
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                dies_with_parent(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=log.parent if env is None else None,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    async def ready(self) -> None:
        """Until it announced itself on its standard output."""
        assert self.process.stdout is not None
        with anyio.move_on_after(START_TIMEOUT_S):
            await anyio.wait_readable(self.process.stdout)
            if self.process.stdout.readline():
                return
        raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")

    def signal(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True
        self.signal(signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.signal(signal.SIGCONT)

    async def ended(self, within_s: float = 20.0) -> int:
        """Its exit code, once it has ended; TimeoutError."""
        try:
            await anyio.to_thread.run_sync(self.process.wait, within_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end within {within_s} s") from None
        if self.process.stdout is not None:
            self.process.stdout.close()
        return int(self.process.returncode)

    async def terminate(self) -> int:
        """SIGTERM, and SIGKILL if that does not help; its exit code."""
        self.wake()
        self.signal(signal.SIGTERM)
        try:
            return await self.ended()
        except TimeoutError:
            self.kill()
            return await self.ended()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def children() -> list[int]:
    """Pids of the living children of this process."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def free_port() -> int:
    """A port of the loopback interface for several processes after each other: outside the range
    from which the kernel draws ports of outgoing connections."""
    for _ in range(1000):
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def client_of(port: int, *, retries: int = 0) -> Any:
    """A plain client."""
    retry = Retry(ConstantBackoff(0.05), retries)
    return aioredis.Redis(host="127.0.0.1", port=port, retry=retry, socket_timeout=5.0)


@dataclass
class RedisServer:
    """One Redis process and its data, which survive a restart."""

    name: str
    directory: Path
    options: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    """A configuration file and what follows it; a Sentinel's."""
    port: int = field(default_factory=free_port)
    child: Child | None = None

    async def start(self, *extra: str) -> None:
        self.directory.mkdir(exist_ok=True)
        command = [redis_binary(), *self.config, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), *self.options, *extra]
        if not self.config:
            command += ["--save", ""]
        command += ["--logfile", str(self.directory / "redis.log")]
        self.child = Child(self.name, command, self.directory / "stderr.log")
        await self.answers()

    async def answers(self) -> None:
        """Until it has loaded its data and answers."""
        client = client_of(self.port)
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                while True:
                    try:
                        await client.ping()
                        return
                    except (RedisError, OSError):
                        await anyio.sleep(0.01)
        finally:
            await client.aclose()

    @property
    def process(self) -> Child:
        assert self.child is not None
        return self.child

    def aof(self) -> Path:
        """The file that is appended to now."""
        return max((self.directory / "appendonlydir").glob("*.incr.aof"))


class Store:
    """What the fleet's processes and the checks use as their store."""

    url_for_checks: str
    servers: list[RedisServer]
    raw: Any
    """A plain client, without a proxy, for checks."""

    async def start(self, proxy: Proxy, directory: Path) -> None:
        raise NotImplementedError

    def url(self, proxy: Proxy, process: str) -> str:
        """For one process of the fleet."""
        raise NotImplementedError

    async def aclose(self) -> None:
        if hasattr(self, "raw"):
            await self.raw.aclose()
        for server in self.servers:
            if server.child is not None:
                server.child.wake()
                server.child.kill()
                await server.child.ended()


class SingleStore(Store):
    """One server with an append-only file; every process has a link of its own to it."""

    def __init__(self, fsync: str = "everysec") -> None:
        self._fsync = fsync

    async def start(self, proxy: Proxy, directory: Path) -> None:
        options = ("--appendonly", "yes", "--appendfsync", self._fsync, "--aof-load-truncated")
        self.server = RedisServer("redis", directory / "redis", (*options, "yes"))
        self.servers = [self.server]
        await self.server.start()
        self.url_for_checks = f"redis://127.0.0.1:{self.server.port}"
        self.raw = client_of(self.server.port, retries=20)
        # So that a write that arrives late is judged by its script, and not for being unknown.
        for name in script_names():
            await self.raw.script_load(load_script(name).source)

    def url(self, proxy: Proxy, process: str) -> str:
        name = f"redis:{process}"
        link = proxy.links.get(name)
        if link is None:
            link = proxy.add(name, ("127.0.0.1", 0), ("127.0.0.1", self.server.port), resp=True)
        return f"redis://{link.endpoint}"


class Node:
    """A gateway or worker: what stays the same over its processes."""

    def __init__(self, name: str, role: str, options: dict[str, Any]) -> None:
        self.name = name
        self.role = role
        self.options = options
        self.env: dict[str, str] = {}
        self.clock: Path | None = None
        """What its wall clock is set off by, if it can be."""
        self.child: Child | None = None

    @property
    def process(self) -> Child:
        assert self.child is not None
        return self.child


class Fleet:
    """See the module's docstring."""

    def __init__(self, proxy: Proxy, store: Store, directory: Path) -> None:
        self.proxy = proxy
        self.store = store
        self.directory = directory
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

    def add_gateway(self, name: str) -> Node:
        port = free_port()
        listen = f"127.0.0.1:{port}"
        self.proxy.add(f"client:{name}", ("127.0.0.1", 0), ("127.0.0.1", port))
        options = {"listen": listen, "gateway_id": name}
        self.nodes[name] = Node(name, "gateway", options)
        return self.nodes[name]

    def add_worker(self, name: str) -> Node:
        engine = {
            "page_size": ENGINE.page_size,
            "capacity_pages": ENGINE.capacity_pages,
            "max_context_tokens": ENGINE.max_context_tokens,
            "max_running": ENGINE.max_running,
            "max_queued": ENGINE.max_queued,
            "eos_probability": ENGINE.eos_probability,
            "step_ms": ENGINE.timing.step_ms,
            "max_prefill_tokens": ENGINE.timing.max_prefill_tokens,
        }
        options = {
            "advertise_host": f"127.0.1.{1 + len(self.workers)}",
            "replica": {
                "replica_id": name,
                "pin_ttl_s": PIN_TTL_S,
                "pull_timeout_s": PULL_TIMEOUT_S,
            },
            "engine": {key: str(value) for key, value in engine.items()},
        }
        self.nodes[name] = Node(name, "worker", options)
        self.move(self.nodes[name])
        return self.nodes[name]

    def unclock(self, worker: Node) -> None:
        """The worker's next process takes its wall clock's offset from a file."""
        library = faketime()
        if library is None:
            raise RuntimeError("libfaketime is not installed (Debian package faketime)")
        worker.clock = self.directory / f"{worker.name}.clock"
        worker.clock.write_text("+0")
        worker.env = {
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
            if child.running:
                child.wake()
                child.kill()
            await child.ended()
        await self.store.aclose()


@asynccontextmanager
async def fleet(
    store: Store, *, workers: int = 3, gateways: int = 2, clocks: bool = False
) -> AsyncIterator[Fleet]:
    """A running fleet. At the end no child of this process may be left. ``clocks``: those of the
    workers can be set."""
    directory = Path(tempfile.mkdtemp(prefix="sessile-faults-"))
    before = set(children())
    try:
        async with anyio.create_task_group() as traffic:
            proxy = Proxy(traffic)
            built = Fleet(proxy, store, directory)
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
