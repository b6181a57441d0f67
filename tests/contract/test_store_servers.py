"""Every script on every kind of server that is supported, with and without TLS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import anyio
import pytest

from statestore import eviction
from statestore.connection import StoreConnection
from statestore.executor import Script, ScriptCall
from statestore.ports import StoreUnavailable
from statestore.redis_executor import connect
from tests.support.servers import free_port, redis_binary, valkey_binary, wait_for
from tests.support.store_servers import (
    Certificates,
    StoreServer,
    follow,
    in_sync,
    lose,
    replica_of,
    running_nodes,
    sentinel_of,
    valkey8_binary,
)
from tests.support.store_servers import (
    cluster_url as url_of,
)
from tests.support.store_smoke import visit_every_script
from tests.support.stores import CountingExecutor

pytestmark = pytest.mark.anyio

BINARIES = pytest.mark.parametrize(
    "binary", [redis_binary, valkey8_binary, valkey_binary], ids=["redis7", "valkey8", "valkey9"]
)


async def visit(url: str, connection: StoreConnection | None = None) -> None:
    executor = await connect(url, connection)
    try:
        await visit_every_script(CountingExecutor(executor))
    finally:
        await executor.aclose()


@BINARIES
async def test_a_server_runs_every_script(binary: Callable[[], str]) -> None:
    with StoreServer(binary()) as server:
        await visit(server.url)


@BINARIES
async def test_a_cluster_runs_every_script(binary: Callable[[], str]) -> None:
    with running_nodes(binary()) as nodes:
        await visit(url_of(nodes))


@BINARIES
async def test_the_primary_behind_a_sentinel_runs_every_script(binary: Callable[[], str]) -> None:
    with (
        StoreServer(binary()) as primary,
        replica_of(primary),
        sentinel_of(primary) as sentinel,
    ):
        in_sync(primary, 1)
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        await visit(url, StoreConnection(wait_replicas=1))


async def test_a_server_runs_every_script_with_tls_on_both_sides(
    certificates: Certificates,
) -> None:
    with StoreServer(redis_binary(), certificates.options(clients=True), tls=True) as server:
        await visit(server.url, certificates.trusted)


async def test_a_cluster_runs_every_script_with_tls(certificates: Certificates) -> None:
    with running_nodes(redis_binary(), 3, *certificates.options(clients=True), tls=True) as nodes:
        await visit(url_of(nodes), certificates.trusted)


async def test_the_primary_behind_a_sentinel_runs_every_script_with_tls(
    certificates: Certificates,
) -> None:
    options = certificates.options(clients=True)
    with (
        StoreServer(redis_binary(), options, tls=True) as primary,
        replica_of(primary, *options),
        sentinel_of(primary, *options) as sentinel,
    ):
        in_sync(primary, 1)
        url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/main"
        await visit(url, replace(certificates.trusted, wait_replicas=1))


@pytest.mark.parametrize("form", ["server", "cluster"])
async def test_no_answer_counts_that_too_few_replicas_have(
    form: str, valkey_url: str, cluster_url: str
) -> None:
    wanting = StoreConnection(wait_replicas=1, wait_timeout_ms=1)
    executor = await connect(valkey_url if form == "server" else cluster_url, wanting)
    calls = [ScriptCall(Script("one", "return 1"), (f"k{i}",), ()) for i in range(9)]
    results = await executor.execute(calls, 5)
    assert {type(result) for result in results} == {StoreUnavailable}
    assert "0 of 1 replicas" in str(results[0])
    await executor.aclose()


async def test_a_cluster_waits_for_the_replica_of_each_node() -> None:
    with running_nodes(valkey_binary()) as nodes, ExitStack() as stack:
        own = ("--cluster-enabled", "yes", "--cluster-port")
        for node in nodes:
            options = (*own, str(free_port()))
            replica = stack.enter_context(StoreServer(node.binary, options))
            follow(node, replica)
        for node in nodes:
            in_sync(node, 1)
        await visit(url_of(nodes), StoreConnection(wait_replicas=1))


def said_of_eviction(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "may be lost" in r.getMessage()]


async def test_a_policy_that_comes_to_evict_is_noticed_on_each_server(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed while the process runs, and with a replica that is promoted."""
    monkeypatch.setattr(eviction, "LOOK_INTERVAL_S", 0.0)
    calls = [ScriptCall(Script("one", "return 1"), (f"k{i}",), ()) for i in range(9)]
    with running_nodes(valkey_binary()) as nodes:
        executor = await connect(url_of(nodes))
        assert await executor.execute(calls, 5) == [1] * 9
        assert said_of_eviction(caplog) == []
        with nodes[1].raw as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        assert await executor.execute(calls, 5) == [1] * 9
        (told,) = said_of_eviction(caplog)
        assert "allkeys-lru" in told
        assert "noeviction" in told
        assert str(nodes[1].port) in told
        await executor.aclose()


async def test_a_promoted_replica_that_may_evict_is_noticed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "LOOK_INTERVAL_S", 0.0)
    calls = [ScriptCall(Script("one", "return 1"), ("k",), ())]
    with (
        StoreServer(redis_binary()) as primary,
        replica_of(primary, "--maxmemory-policy", "volatile-lru"),
        sentinel_of(primary) as sentinel,
    ):
        in_sync(primary, 1)
        with sentinel.raw as client:
            wait_for(lambda: len(client.execute_command("SENTINEL REPLICAS", "main")) == 1)
        executor = await connect(
            f"redis+sentinel://127.0.0.1:{sentinel.port}/main", StoreConnection(wait_replicas=0)
        )
        assert await executor.execute(calls, 5) == [1]
        assert said_of_eviction(caplog) == []
        lose(primary, sentinel)
        with anyio.fail_after(30):
            while await executor.execute(calls, 5) != [1]:
                pass
        assert "volatile-lru" in said_of_eviction(caplog)[0]
        await executor.aclose()
