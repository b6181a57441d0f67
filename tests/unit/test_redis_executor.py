"""The executor on real servers: what it refuses, and what becomes of failures."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from redis import exceptions as errors
from redis.asyncio import Redis

from statestore.connection import StoreConnection, parse_address
from statestore.executor import Script, ScriptCall
from statestore.ports import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable
from statestore.redis_clients import server_client
from statestore.redis_executor import ServerExecutor, connect
from statestore.redis_failures import check_info, failure
from statestore.redis_store import RedisStore
from tests.support.owners import Owner
from tests.support.servers import free_port, redis_binary, running_server, valkey_binary
from tests.support.store_servers import StoreServer, lose, replica_of, sentinel_of
from tests.support.stores import ServerBackend, server_backend, store_on

pytestmark = pytest.mark.anyio


def call(source: str, *keys: str) -> ScriptCall:
    return ScriptCall(Script("test", source), keys or ("k",), (b"\x00\xff", "ü", 7))


def client_of(url: str) -> Redis:
    settings = StoreConnection()
    return server_client(parse_address(url, settings), settings)


@pytest.fixture
async def backend(valkey_url: str, anyio_backend: str) -> AsyncIterator[ServerBackend]:
    async with server_backend(valkey_url) as server:
        yield server


async def test_replies_come_in_order_and_bytes_survive(backend: ServerBackend) -> None:
    replies = await backend.executor.execute(
        [call("return ARGV"), call("return {1, false}"), call("return KEYS[1]", "schlüssel")], 5
    )
    assert replies == [[b"\x00\xff", "ü".encode(), b"7"], [1, None], "schlüssel".encode()]


async def test_scripts_are_loaded_again_when_the_server_forgot_them(
    backend: ServerBackend,
) -> None:
    calls = [call("return 1"), call("return 2")]
    for _ in range(2):
        await backend.raw.script_flush()
        assert await backend.executor.execute(calls, 5) == [1, 2]
        assert await backend.executor.execute(calls, 5) == [1, 2]


async def test_a_cluster_runs_calls_on_all_its_nodes(cluster_url: str) -> None:
    async with server_backend(cluster_url) as server:
        calls = [call(f"redis.call('SET', KEYS[1], {i}); return {i}", f"k{i}") for i in range(30)]
        for _ in range(2):
            assert await server.executor.execute(calls, 5) == list(range(30))


async def test_one_failed_call_leaves_the_others_alone(backend: ServerBackend) -> None:
    good, bad = call("return 1"), call("return redis.call('HGET', KEYS[1])")
    first, failure, last = await backend.executor.execute([good, bad, good], 5)
    assert (first, last) == (1, 1)
    assert isinstance(failure, StoreCorrupt)


async def test_a_server_that_is_silent_for_too_long_gave_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        executor = ServerExecutor(client_of(f"redis://127.0.0.1:{silent.getsockname()[1]}"))
        results = await executor.execute([call("return 1"), call("return 2")], 0.01)
        assert [type(result) for result in results] == [StoreUnavailable] * 2
        await executor.aclose()


def test_a_write_to_a_connection_that_was_just_reset_is_no_answer(valkey_url: str) -> None:
    """uvloop refuses it with a RuntimeError, which redis-py passes on as it is."""

    async def reset_between_look_and_write() -> None:
        client = client_of(valkey_url)
        executor = ServerExecutor(client)
        assert await executor.execute([call("return 1")], 5) == [1]
        connection: Any = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        send = connection.send_packed_command

        async def send_late(*args: Any, **options: Any) -> None:
            connection._writer.transport.abort()
            await anyio.lowlevel.checkpoint()  # the loop closes the handle
            await send(*args, **options)

        connection.send_packed_command = send_late
        await client.connection_pool.release(connection)
        (result,) = await executor.execute([call("return 1")], 5)
        assert isinstance(result, StoreUnavailable)
        connection.send_packed_command = send
        assert await executor.execute([call("return 1")], 5) == [1]
        await executor.aclose()

    anyio.run(reset_between_look_and_write, backend_options={"use_uvloop": True})


def test_a_bug_is_not_taken_for_a_lost_connection() -> None:
    closed = RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed")
    assert isinstance(failure(closed), StoreUnavailable)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        failure(RuntimeError("cannot reuse already awaited coroutine"))


async def test_a_refused_connection_is_no_answer() -> None:
    executor = ServerExecutor(client_of(f"redis://127.0.0.1:{free_port()}"))
    results = await executor.execute([call("return 1"), call("return 2")], 5)
    assert [type(result) for result in results] == [StoreUnavailable] * 2
    await executor.aclose()


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_connecting_to_nobody_fails(scheme: str) -> None:
    with pytest.raises(StoreUnavailable):
        await connect(f"{scheme}://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["http://h", "redis+foo://h", "h:6379", "redis+sentinel://h:1"])
async def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://"):
        await connect(url)


async def test_a_server_that_may_evict_is_refused_with_the_remedy() -> None:
    with (
        running_server(valkey_binary(), "--maxmemory-policy", "allkeys-lru") as url,
        pytest.raises(StoreMisconfigured, match="CONFIG SET maxmemory-policy noeviction"),
    ):
        await connect(url)


async def test_wrong_credentials_are_refused_not_retried() -> None:
    with running_server(valkey_binary(), "--requirepass", "secret") as url:
        with pytest.raises(StoreMisconfigured, match="credentials"):
            await connect(url.replace("unix://", "unix://:wrong@"))
        executor = await connect(url.replace("unix://", "unix://:secret@"))
        await executor.aclose()


def test_an_old_server_is_refused() -> None:
    with pytest.raises(StoreMisconfigured, match="use Redis 7"):
        check_info({"redis_version": "6.2.6"})
    check_info({"redis_version": "7.0.0", "maxmemory_policy": "noeviction"})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.ConnectionError("reset"), StoreUnavailable),
        (errors.TimeoutError(), StoreUnavailable),
        (errors.BusyLoadingError("loading"), StoreUnavailable),
        (errors.ReadOnlyError("replica"), StoreUnavailable),
        (errors.OutOfMemoryError("oom"), StoreUnavailable),
        (errors.ClusterDownError("down"), StoreUnavailable),
        (errors.TryAgainError("moving"), StoreUnavailable),
        (errors.SlotNotCoveredError("slot"), StoreUnavailable),
        (errors.NoScriptError("unknown"), StoreUnavailable),
        (errors.ResponseError("BUSY running a script"), StoreUnavailable),
        (errors.ResponseError("MISCONF disk"), StoreUnavailable),
        (errors.ResponseError("NOREPLICAS Not enough"), StoreUnavailable),
        (OSError("unreachable"), StoreUnavailable),
        (errors.AuthenticationError("wrong"), StoreMisconfigured),
        (errors.NoPermissionError("acl"), StoreMisconfigured),
        (errors.ResponseError("WRONGTYPE Operation"), StoreCorrupt),
        (errors.ResponseError("ERR user_script:1: bad"), StoreCorrupt),
    ],
)
def test_each_failure_has_its_meaning(error: Exception, kind: type[StoreError]) -> None:
    assert isinstance(failure(error, "append"), kind)


async def test_an_append_costs_one_read_and_two_writes(backend: ServerBackend) -> None:
    owner = await Owner.of(store_on(backend))
    await owner.begun()
    await owner.write(4)
    await backend.raw.config_resetstat()
    await owner.write(5)
    stats = await backend.raw.info("commandstats")
    calls = {
        name.removeprefix("cmdstat_"): stat["calls"]
        for name, stat in stats.items()
        if not name.startswith(("cmdstat_info", "cmdstat_config"))
    }
    assert calls == {"evalsha": 1, "hmget": 1, "time": 1, "append": 1, "hset": 1}


class Deaf:
    """A client whose peer does not answer the end of the connection."""

    def __init__(self) -> None:
        self.asked = 0

    async def aclose(self) -> None:
        self.asked += 1
        raise errors.TimeoutError("Timed out closing connection after 0.4")


async def test_a_peer_that_does_not_answer_a_close_fails_nobody() -> None:
    clients: list[Any] = [Deaf(), Deaf(), Deaf()]
    await ServerExecutor(clients[0], clients[1:]).aclose()
    assert [client.asked for client in clients] == [1, 1, 1]


@pytest.mark.slow
async def test_sentinel_leads_to_the_new_primary_after_a_fail_over() -> None:
    with (
        StoreServer(redis_binary()) as primary,
        replica_of(primary) as replica,
        sentinel_of(primary) as sentinel,
    ):
        executor = await connect(f"redis+sentinel://127.0.0.1:{sentinel.port}/main")
        store = RedisStore(executor)
        owner = await Owner.of(store)
        await _replicated(replica.port, "sessile:{f}:s:ses_f", sentinel.port)
        lose(primary, sentinel)
        with anyio.fail_after(30):
            while True:
                try:
                    outcome = await owner.begin()
                    break
                except StoreUnavailable:
                    await anyio.sleep(0.05)
        assert type(outcome).__name__ == "TurnBegun"
        await executor.aclose()


async def _replicated(port: int, key: str, sentinel: int) -> None:
    """Until the replica has the key and Sentinel knows the replica."""
    replica: Any = Redis(port=port)
    watcher: Any = Redis(port=sentinel)
    with anyio.fail_after(30):
        while True:
            known = await watcher.execute_command("SENTINEL REPLICAS", "main")
            if known and await replica.exists(key):
                break
            await anyio.sleep(0.05)
    await replica.aclose()
    await watcher.aclose()
