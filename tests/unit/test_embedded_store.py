"""The private server: it comes up, keeps its data if asked to, and never outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from redis.asyncio import Redis

from statestore import embedded
from statestore.embedded import embedded_server, find_server
from statestore.ports import StoreMisconfigured, StoreUnavailable
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from tests.support.owners import Owner
from tests.support.servers import valkey_binary

pytestmark = pytest.mark.anyio

PARENT = """
import sys, anyio
from pathlib import Path
from statestore.embedded import embedded_server
async def main():
    async with embedded_server(Path(sys.argv[1]), binary=sys.argv[2]) as url:
        print(url, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_private_server_works_and_is_gone_afterwards() -> None:
    async with embedded_server() as url:
        socket = Path(url.removeprefix("unix://"))
        assert oct(socket.parent.stat().st_mode & 0o777) == "0o700"
        executor = await connect(url)
        await (await Owner.of(RedisStore(executor))).run_turn("t1", [4])
        await executor.aclose()
        pid = await _pid(url)
    assert not _alive(pid)
    assert not socket.parent.exists()


async def test_data_in_a_given_directory_are_kept(tmp_path: Path) -> None:
    for run in range(2):
        async with embedded_server(tmp_path / "data", binary=valkey_binary()) as url:
            client = Redis.from_url(url)
            assert await client.get("k") == (b"v" if run else None)
            await client.set("k", "v")
            assert (await client.config_get("appendfsync"))["appendfsync"] == "everysec"
            assert (await client.config_get("save"))["save"] == ""
            await client.aclose()


async def test_a_killed_parent_leaves_no_server_and_the_data(tmp_path: Path) -> None:
    parent, url = _parent(tmp_path)
    client = Redis.from_url(url)
    await client.set("k", "v")
    await client.aclose()
    pid = await _pid(url)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    # The directory stays locked until the old server is gone: the new one waits for that.
    async with embedded_server(tmp_path, binary=valkey_binary()) as url:
        assert not _alive(pid)
        client = Redis.from_url(url)
        assert await client.get("k") == b"v"
        await client.aclose()


async def test_a_directory_serves_one_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.05)
    async with embedded_server(tmp_path, binary=valkey_binary()):
        with pytest.raises(StoreMisconfigured, match="another server uses"):
            async with embedded_server(tmp_path, binary=valkey_binary()):
                pass


async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "server"
    broken.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    broken.chmod(0o700)
    with pytest.raises(StoreUnavailable, match="out of luck"):
        async with embedded_server(binary=str(broken)):
            pass


def test_an_installed_server_of_a_fitting_version_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    server = tmp_path / "redis-server"
    for version, chosen in (("6.2.1", valkey_binary()), ("7.2.0", str(server))):
        server.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
        server.chmod(0o700)
        assert find_server() == chosen


def _parent(data: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that runs a server, and the server's URL."""
    command = [sys.executable, "-c", PARENT, str(data), valkey_binary()]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        return parent, parent.stdout.readline().strip()


async def _pid(url: str) -> int:
    client = Redis.from_url(url)
    info = await client.info("server")
    await client.aclose()
    return int(info["process_id"])


def _alive(pid: int) -> bool:
    """Neither gone nor waiting for whoever adopted it to look at its exit status."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def test_the_server_answers_several_processes() -> None:
    async with embedded_server() as url:
        found = await anyio.run_process(
            [sys.executable, "-c", f"import redis; print(redis.from_url({url!r}).ping())"]
        )
        assert found.stdout.strip() == b"True"
