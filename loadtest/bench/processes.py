"""Real processes for benchmarks and end-to-end tests: an embedded store, gateways and workers with
the sim engine, each a Python process of its own that ends with its parent."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gateway.config import GatewayConfig
from gateway.main import run as run_gateway
from statestore.embedded import dies_with_parent
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import run as run_worker

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
MODULE = "loadtest.bench.processes"


class Process:
    """One child. ``address`` is the host:port it announced."""

    def __init__(self, role: str, options: Mapping[str, object], log: Path) -> None:
        command = [sys.executable, "-m", MODULE, role, json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                dies_with_parent(command),
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            )
        self.role = role
        self.log = log
        self.address = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Until it announced its address. Raises RuntimeError with the end of its log."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"{self.role} did not start:\n{self.log.read_text()[-3000:]}")
        self.address = line.split()[-1]

    def kill(self) -> None:
        """SIGKILL: no good-bye. Returns at once; :meth:`reap` later."""
        os.kill(self._process.pid, signal.SIGKILL)

    def pause(self, stopped: bool) -> None:
        """SIGSTOP or SIGCONT."""
        os.kill(self._process.pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def reap(self) -> int:
        """Waits for the end of a process that was told to end; returns its exit code."""
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that does not help in time; returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self.reap()


class Cluster:
    """Children that share one store; all are stopped at the end."""

    def __init__(self, redis_url: str, logs: Path) -> None:
        self.redis_url = redis_url
        self._logs = logs
        self._children: list[Process] = []

    def gateway(self) -> Process:
        """Starts a gateway on a free port; call ``wait_ready``."""
        return self._start("gateway", "gateway", {})

    def worker(self, replica_id: str, **engine: object) -> Process:
        """Starts a worker with the sim engine; ``engine`` are its options."""
        options = {name: str(value) for name, value in engine.items()}
        return self._start("worker", replica_id, {"replica_id": replica_id, "engine": options})

    def _start(self, role: str, name: str, options: Mapping[str, object]) -> Process:
        log = self._logs / f"{name}.log"
        child = Process(role, {"redis_url": self.redis_url, **options}, log)
        self._children.append(child)
        return child

    def forget(self, child: Process) -> None:
        """Reaps a child that was killed."""
        child.reap()
        self._children.remove(child)

    def stop(self) -> None:
        """Stops all, workers first."""
        for child in sorted(self._children, key=lambda c: c.role, reverse=True):
            child.stop()
        self._children.clear()


@contextmanager
def cluster(redis_url: str, logs: Path) -> Iterator[Cluster]:
    """A cluster of processes over a store that runs already."""
    made = Cluster(redis_url, logs)
    try:
        yield made
    finally:
        made.stop()


def main(role: str, options: Mapping[str, object]) -> None:
    """The child's side: runs a gateway or a worker until it is told to stop."""
    logging.basicConfig(
        level=os.environ.get("SESSILE_LOG", "WARNING"),
        format="%(asctime)s.%(msecs)03d %(name)s %(message)s",
        datefmt="%H:%M:%S",
    )
    redis_url = str(options["redis_url"])
    if role == "gateway":
        run_gateway(GatewayConfig(listen="127.0.0.1:0", redis_url=redis_url))
        return
    engine = options["engine"]
    assert isinstance(engine, dict)
    run_worker(
        WorkerConfig(
            redis_url=redis_url,
            replica=ReplicaSettings(replica_id=str(options["replica_id"])),
            engine="sim",
            engine_options=tuple(sorted(engine.items())),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
