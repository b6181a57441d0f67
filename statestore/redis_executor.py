"""Scripts on a real server: Redis 7 or newer, or Valkey; single, behind Sentinel, or a Cluster.

:mod:`statestore.connection` has the forms of URLs, :mod:`statestore.redis_clients` the clients,
:mod:`statestore.redis_failures` what their failures mean, :mod:`statestore.cluster_executor` the
executor of Clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import anyio
from redis.asyncio import Redis

from statestore import keys
from statestore.cluster_executor import ClusterExecutor
from statestore.connection import StoreConnection, parse_address, redacted
from statestore.eviction import EvictionWatch
from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import StoreError, StoreMisconfigured, StoreUnavailable
from statestore.redis_clients import check_files, cluster_client, sentinel_client, server_client
from statestore.redis_failures import (
    FAILURES,
    ScriptUnknown,
    check_info,
    close_all,
    failure,
    failure_to_connect,
    no_answer,
    tell_doubts,
)
from statestore.redis_pipelines import NO_REPLICAS, ReplicaWait, add_calls, meanings

log = logging.getLogger(__name__)

CONNECT_INTERVAL_S = 0.5
"""Between tries while the store is not there at the start."""
TELL_INTERVAL_S = 5.0
"""Between the log's lines about it."""
_FENCE = keys.fence_key("0")


class ServerExecutor:
    """One server, or the present primary of a Sentinel service. Owns the client."""

    def __init__(
        self, client: Redis, sentinels: Sequence[Redis] = (), wait: ReplicaWait = NO_REPLICAS
    ) -> None:
        self._client = client
        self._sentinels = sentinels
        self._wait = wait
        self._eviction = EvictionWatch()

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        results: list[Reply | StoreError] = [no_answer(timeout_s)] * len(calls)
        with anyio.move_on_after(timeout_s):
            results = await self._run(calls, load=False)
            again = [i for i, result in enumerate(results) if isinstance(result, ScriptUnknown)]
            if again:
                replies = await self._run([calls[i] for i in again], load=True)
                for i, reply in zip(again, replies, strict=True):
                    results[i] = reply
        return results

    async def _run(self, calls: Sequence[ScriptCall], *, load: bool) -> list[Reply | StoreError]:
        pipeline: Any = self._client.pipeline(transaction=False)
        add_calls(pipeline, calls, load=load)
        looks = self._eviction.add(pipeline)
        self._wait.add(pipeline, _FENCE)
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except (*FAILURES, StoreError) as error:
            return [failure(error)] * len(calls)
        if looks:
            self._eviction.look(replies[len(calls) :])
        return self._wait.settled(meanings(calls, replies[: len(calls)]), replies)

    async def check(self) -> None:
        """Raises StoreError, or what the client raises."""
        info = await self._client.info()
        check_info(info)
        if int(info.get("cluster_enabled", 0)):
            raise StoreMisconfigured("the store is a Cluster: its URL begins with redis+cluster://")
        if info.get("role") == "slave":
            raise StoreUnavailable(
                f"the store is a replica of {info.get('master_host')}:{info.get('master_port')},"
                " which takes no writes: the URL has to lead to the primary"
            )
        tell_doubts(info, self._wait.replicas)

    async def aclose(self) -> None:
        await close_all(self._client, *self._sentinels)


async def connect(
    url: str, connection: StoreConnection | None = None, *, timeout_s: float = 5.0
) -> ScriptExecutor:
    """Connects, and checks that the server is one that keeps what it acknowledges.

    Raises StoreUnavailable if it cannot be reached in time, StoreMisconfigured if it is too old,
    may evict keys, refuses the credentials or is not trusted, ValueError for a URL of another form
    or one that the settings contradict.
    """
    connection = connection or StoreConnection()
    address = parse_address(url, connection)
    check_files(address, connection)
    wait = ReplicaWait.of(connection)
    executor: ServerExecutor | ClusterExecutor
    if address.kind == "cluster":
        executor = ClusterExecutor(cluster_client(address, connection), wait)
    elif address.kind == "sentinel":
        executor = ServerExecutor(*sentinel_client(address, connection), wait)
    else:
        executor = ServerExecutor(server_client(address, connection), wait=wait)
    try:
        with anyio.fail_after(timeout_s):
            await executor.check()
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await executor.aclose()
        if isinstance(error, TimeoutError):  # of fail_after; the client has one of its own
            raise no_answer(timeout_s) from error
        if isinstance(error, FAILURES):
            raise failure_to_connect(error, tls=address.tls) from error
        raise
    return executor


async def connect_when_there(
    url: str, connection: StoreConnection | None = None, *, timeout_s: float = 5.0
) -> ScriptExecutor:
    """The same, but a store that is not there is waited for, ``wait_s`` at most, and the log says
    every few seconds what is missing. What no waiting will change is raised at once."""
    connection = connection or StoreConnection()
    begun = anyio.current_time()
    told: float | None = None
    while True:
        try:
            executor = await connect(url, connection, timeout_s=timeout_s)
        except StoreUnavailable as error:
            now = anyio.current_time()
            if connection.wait_s is not None and now - begun >= connection.wait_s:
                raise
            if told is None or now - told >= TELL_INTERVAL_S:
                told = now
                log.warning(
                    "waiting for the store at %s since %.0f s: %s",
                    redacted(url),
                    now - begun,
                    error,
                )
            await anyio.sleep(CONNECT_INTERVAL_S)
        else:
            if told is not None:
                log.info("the store is there after %.0f s", anyio.current_time() - begun)
            return executor
