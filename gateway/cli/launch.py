"""A whole fleet as child processes on this machine: the store, gateways, workers.

    async with Cluster(engine="sim") as cluster:
        await cluster.start(gateways=2, workers=3)
        async with Sessile(cluster.targets) as client:
            ...
        cluster.workers[0].kill()

Every child has a log file, and dies with this process, however that dies. Start the cluster from
the main thread: on Linux a child dies when the thread that started it ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import anyio
from sessile import ReplicaState, RetryPolicy, Sessile, Unavailable

from statestore.embedded import dies_with_parent, embedded_server

START_TIMEOUT_S = 300.0
"""The first start of an engine may have to convert its model."""
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.02
LOG_TAIL_CHARS = 2000
ONE_TRY = RetryPolicy(max_attempts=1)
"""A gateway that does not answer is asked again in the next look, if it still runs."""
_SERVING = re.compile(r"^sessile \w+ \S+ on (\S+)$", re.MULTILINE)

AT_ONCE = {"SESSILE_WORKER__REPLICA__DRAIN_GRACE_S": "0"}
"""The whole fleet ends together: there is nowhere that sessions could be moved to."""

Kind = Literal["gateway", "worker"]


class LaunchFailed(Exception):
    """A child did not come up; the message ends with what it logged last."""


@dataclass(eq=False)
class Child:
    """One process of the fleet."""

    kind: Kind
    name: str
    log: Path
    process: subprocess.Popen[bytes]
    address: str = ""
    """host:port, once it serves."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self.process.poll()

    @property
    def running(self) -> bool:
        return self.exit_code is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; SIGSTOP and SIGCONT make a zombie and wake it."""
        self.process.send_signal(number)

    def log_tail(self) -> str:
        """What it logged last."""
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]


@dataclass
class Cluster:
    """An async context manager; leaving it ends every child, the store last.

    Without ``redis_url`` it starts a private store, which keeps its data in ``data_directory``, or
    not at all. An empty ``engine`` leaves it to the workers' settings. ``engine_options`` go to
    each worker's engine as text. Logs are written to ``log_directory`` (default: a new temporary
    one, which is left there for reading).
    """

    engine: str = "sim"
    engine_options: Mapping[str, str] = field(default_factory=dict)
    redis_url: str = ""
    data_directory: Path | None = None
    log_directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the children's environment."""
    children: list[Child] = field(default_factory=list, init=False)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, init=False, repr=False)

    async def __aenter__(self) -> Self:
        if self.log_directory is None:
            self.log_directory = Path(tempfile.mkdtemp(prefix="sessile-logs-"))
        self.log_directory.mkdir(parents=True, exist_ok=True)
        if not self.redis_url:
            self.redis_url = await self._stack.enter_async_context(
                embedded_server(self.data_directory)
            )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with anyio.CancelScope(shield=True):
            # Gateways first, so that no stream is taken over by a worker that is about to go.
            await self.stop(self.gateways)
            await self.stop(self.workers)
            await self._stack.aclose()

    @property
    def gateways(self) -> list[Child]:
        """In order of their start, dead ones included."""
        return [child for child in self.children if child.kind == "gateway"]

    @property
    def workers(self) -> list[Child]:
        """In order of their start, dead ones included."""
        return [child for child in self.children if child.kind == "worker"]

    @property
    def targets(self) -> list[str]:
        """Addresses of the gateways that serve."""
        return [child.address for child in self.gateways if child.running and child.address]

    async def start(
        self, *, gateways: int, workers: int, listen: str = "127.0.0.1:0", suffix: str = ""
    ) -> None:
        """Starts so many of each, at once, and waits until every gateway sees every worker. The
        first gateway listens on ``listen``, the others on the ports after it (on free ones if it
        is 0). Workers are called r1, r2 …, each with ``suffix``. Raises LaunchFailed, in an
        ExceptionGroup if a child did not come up."""
        host, _, port = listen.rpartition(":")
        async with anyio.create_task_group() as tasks:
            for index in range(gateways):
                own = f"{host}:{int(port) + index if int(port) else 0}"
                tasks.start_soon(self.start_gateway, own)
            for index in range(workers):
                tasks.start_soon(self.start_worker, f"r{index + 1}{suffix}")
        await self.wait_ready()

    async def start_gateway(self, listen: str = "127.0.0.1:0") -> Child:
        """Starts a gateway; returns when it serves. Raises LaunchFailed."""
        arguments = ["--listen", listen]
        return await self._start("gateway", f"gateway-{len(self.gateways) + 1}", arguments)

    async def start_worker(
        self,
        replica_id: str,
        *,
        engine: str = "",
        engine_options: Mapping[str, str] | None = None,
    ) -> Child:
        """Starts a worker as this replica (again: as its next incarnation); returns when it
        serves. With an ``engine`` of its own it has only these options. Raises LaunchFailed."""
        arguments = ["--id", replica_id]
        if engine or self.engine:
            arguments += ["--engine", engine or self.engine]
        usual = {} if engine else self.engine_options
        for name, value in {**usual, **(engine_options or {})}.items():
            arguments += ["--engine-option", f"{name}={value}"]
        return await self._start("worker", replica_id, arguments)

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every gateway that serves by then sees every worker that does as READY. Raises
        LaunchFailed, also if no gateway is left."""
        missing: dict[str, list[str]] = {}
        async with AsyncExitStack() as stack:
            clients: dict[str, Sessile] = {}
            with anyio.move_on_after(timeout_s):
                while targets := self.targets:
                    for target in targets:
                        if target not in clients:
                            client = Sessile(target, retry=ONE_TRY)
                            clients[target] = await stack.enter_async_context(client)
                    missing = {target: await self._missing(clients[target]) for target in targets}
                    if not any(missing.values()):
                        return
                    await anyio.sleep(POLL_INTERVAL_S)
                raise LaunchFailed("no gateway runs any more")
        seen = "; ".join(f"{target}: {', '.join(names)}" for target, names in missing.items())
        raise LaunchFailed(f"not ready after {timeout_s:g} s (gateway: replicas missing): {seen}")

    async def _missing(self, client: Sessile) -> list[str]:
        """Workers that serve and that this gateway does not see as READY. A replica is known by its
        address: one of its name may be a process that was killed just now."""
        with suppress(Unavailable):
            replicas = await client.fleet.replicas()
            ready = {r.endpoint for r in replicas if r.state is ReplicaState.READY}
            return [w.name for w in self.workers if w.running and w.address not in ready]
        return ["all"]

    async def stop(self, children: Iterable[Child], timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL for what is still there after ``timeout_s``. Returns when all have
        ended."""
        running = [child for child in children if child.running]
        for child in running:
            child.kill(signal.SIGTERM)
            child.kill(signal.SIGCONT)
        with anyio.move_on_after(timeout_s):
            await _until(lambda: not any(child.running for child in running))
        for child in running:
            if child.running:
                child.kill()
        await _until(lambda: not any(child.running for child in running))

    async def _start(self, kind: Kind, name: str, arguments: list[str]) -> Child:
        child = self._spawn(kind, name, [sys.executable, "-m", "gateway.cli", kind, *arguments])
        with anyio.move_on_after(START_TIMEOUT_S):
            while child.running:
                serving = _SERVING.search(child.log.read_text(errors="replace"))
                if serving is not None:
                    child.address = serving[1]
                    return child
                await anyio.sleep(POLL_INTERVAL_S)
        code = child.exit_code
        what = "is not up yet" if code is None else f"ended with {code}"
        raise LaunchFailed(f"{name} {what}; its log {child.log} ends:\n{child.log_tail()}")

    def _spawn(self, kind: Kind, name: str, command: list[str]) -> Child:
        assert self.log_directory is not None, "the cluster is entered"
        variable = f"SESSILE_{kind.upper()}__REDIS_URL"
        starts = sum(child.name == name for child in self.children)
        log = self.log_directory / (f"{name}.log" if not starts else f"{name}.{starts + 1}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                dies_with_parent(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Not on the command line, which every user of the machine can read.
                env={**os.environ, **AT_ONCE, **self.environment, variable: self.redis_url},
                # A Ctrl-C is for this process, which then ends its children in order.
                start_new_session=True,
            )
        child = Child(kind, name, log, process)
        self.children.append(child)
        return child


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nobody tells when a child ends
        await anyio.sleep(POLL_INTERVAL_S)
