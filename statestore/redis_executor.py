"""Scripts on a real server: Redis 7 or newer, or Valkey; single, behind Sentinel, or a Cluster.

    redis://[user:password@]host:port[/db]      one server (rediss:// with TLS)
    unix:///path/to/socket                      one server on this machine
    redis+sentinel://[user:password@]host:port,host:port/service[/db]
    redis+cluster://[user:password@]host:port,host:port

(``rediss+sentinel`` and ``rediss+cluster`` with TLS.) The client library's own silent retries are
off: repeats belong to the script runner, which has the injected clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

import anyio
from redis import exceptions as errors
from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable

MAX_CONNECTIONS = 64
"""Per process and server; further calls wait for one (in a Cluster: fail and are repeated)."""
OLDEST_VERSION = 7

# Conditions of a server that pass, or that an operator ends while callers repeat.
_TRANSIENT = ("BUSY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "MISCONF", "OOM")
# TimeoutError of the standard library is an OSError.
_FAILURES = (errors.RedisError, errors.RedisClusterException, OSError, RuntimeError)
"""What clients raise. RuntimeError: see :func:`_failure`."""


class _Pipeline(Protocol):
    """What pipelines of a server and of a cluster have in common."""

    def execute_command(self, *args: Any) -> Any: ...

    async def execute(self, raise_on_error: bool = True) -> list[Any]: ...


class ServerExecutor:
    """One server, or the present primary of a Sentinel service. Owns the client."""

    def __init__(self, client: Redis, sentinels: Sequence[Redis] = ()) -> None:
        self._client = client
        self._sentinels = sentinels

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        pipeline = cast(_Pipeline, self._client.pipeline(transaction=False))
        results: list[Reply | StoreError] = [_no_answer(timeout_s)] * len(calls)
        with anyio.move_on_after(timeout_s):
            results = await _run(pipeline, calls)
            again = [i for i, result in enumerate(results) if isinstance(result, _ScriptUnknown)]
            if again:
                pipeline = cast(_Pipeline, self._client.pipeline(transaction=False))
                replies = await _run(pipeline, [calls[i] for i in again], load=True)
                for i, reply in zip(again, replies, strict=True):
                    results[i] = reply
        return results

    async def check(self) -> None:
        """Raises StoreMisconfigured, or what the client raises."""
        check_info(await self._client.info())

    async def aclose(self) -> None:
        for client in (self._client, *self._sentinels):
            await client.aclose()


class ClusterExecutor:
    """A Cluster. Calls are grouped by the node that serves their slot, so that a node which does
    not answer fails its own calls only. Owns the client."""

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._topology_doubtful = False

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        results: list[Reply | StoreError] = [_no_answer(timeout_s)] * len(calls)
        with anyio.move_on_after(timeout_s):
            try:
                groups = await self._by_node(calls)
            except _FAILURES as error:
                self._topology_doubtful = True
                return [_failure(error)] * len(calls)
            async with anyio.create_task_group() as tasks:
                for group in groups:
                    tasks.start_soon(self._execute_group, calls, group, results)
        if any(isinstance(result, StoreUnavailable) for result in results):
            self._topology_doubtful = True
        return results

    async def _by_node(self, calls: Sequence[ScriptCall]) -> list[list[int]]:
        await self._client.initialize()
        if self._topology_doubtful:
            await self._client.nodes_manager.initialize()
            self._topology_doubtful = False
        groups: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            node = self._client.get_node_from_key(call.keys[0])
            groups.setdefault(node.name if node else "", []).append(i)
        return list(groups.values())

    async def _execute_group(
        self, calls: Sequence[ScriptCall], group: list[int], results: list[Reply | StoreError]
    ) -> None:
        load = False
        while group:
            pipeline = cast(_Pipeline, self._client.pipeline())
            replies = await _run(pipeline, [calls[i] for i in group], load=load)
            unknown: list[int] = []
            for i, reply in zip(group, replies, strict=True):
                results[i] = reply
                if isinstance(reply, _ScriptUnknown):
                    unknown.append(i)
            if load:
                return
            group, load = unknown, True

    async def check(self) -> None:
        """Raises StoreMisconfigured, or what the client raises."""
        await self._client.initialize()
        for node in self._client.get_primaries():
            check_info(await self._client.info(target_nodes=node))

    async def aclose(self) -> None:
        await self._client.aclose()


class _ScriptUnknown(StoreUnavailable):
    """The server does not know the script yet (or forgot it in a restart)."""


async def connect(url: str, *, timeout_s: float = 5.0) -> ScriptExecutor:
    """Connects, and checks that the server is one that keeps what it acknowledges.

    Raises StoreUnavailable if it cannot be reached in time, StoreMisconfigured if it is too old or
    may evict keys, ValueError for a URL of another form.
    """
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    executor: ServerExecutor | ClusterExecutor
    if scheme not in ("redis", "rediss", "unix") or kind not in ("", "sentinel", "cluster"):
        given = f"not {urlsplit(url).scheme}://" if "://" in url else "and this one has no ://"
        raise ValueError(
            "a store URL begins with redis://, rediss://, unix://, redis+sentinel:// or "
            f"redis+cluster://, {given}"
        )
    if kind == "cluster":
        executor = ClusterExecutor(_cluster_client(url))
    else:
        executor = _sentinel_executor(url) if kind else ServerExecutor(_server_client(url))
    try:
        with anyio.fail_after(timeout_s):
            await executor.check()
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await executor.aclose()
        if isinstance(error, _FAILURES):
            raise _failure(error) from error
        raise
    return executor


def _options() -> dict[str, Any]:
    """Of every connection. Time limits are the executor's, for whole calls."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "protocol": 2,
    }


def _server_client(url: str) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url, max_connections=MAX_CONNECTIONS, timeout=None, **_options()
    )
    return Redis.from_pool(pool)


def _sentinel_executor(url: str) -> ServerExecutor:
    options, hosts, path = _parse(url, default_port=26379)
    service, _, db = path.partition("/")
    if not service:
        raise ValueError("a Sentinel URL names its service: redis+sentinel://host:port/service")
    sentinel: Any = cast(Any, Sentinel)(hosts, sentinel_kwargs=_options(), **_options())
    primary = sentinel.master_for(
        service, db=int(db or 0), max_connections=MAX_CONNECTIONS, **options
    )
    return ServerExecutor(primary, sentinel.sentinels)


def _cluster_client(url: str) -> RedisCluster:
    options, hosts, _ = _parse(url, default_port=6379)
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return RedisCluster(
        startup_nodes=nodes, max_connections=MAX_CONNECTIONS, **_options(), **options
    )


def _parse(url: str, default_port: int) -> tuple[dict[str, Any], list[tuple[str, int]], str]:
    """(connection options, hosts, path) of a URL with several hosts."""
    parts = urlsplit(url)
    credentials, _, netloc = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    hosts: list[tuple[str, int]] = []
    for item in netloc.split(","):
        host, _, port = item.rpartition(":") if ":" in item else (item, "", default_port)
        hosts.append((host, int(port)))
    options: dict[str, Any] = {"ssl": True} if parts.scheme.startswith("rediss") else {}
    if user:
        options["username"] = unquote(user)
    if password:
        options["password"] = unquote(password)
    return options, hosts, parts.path.strip("/")


def check_info(info: dict[str, Any]) -> None:
    """Refuses a server whose INFO says that it would lose data silently."""
    version = str(info.get("redis_version", "0"))
    if int(version.partition(".")[0]) < OLDEST_VERSION:
        raise StoreMisconfigured(
            f"the store is version {version}: use Redis {OLDEST_VERSION} or newer, or Valkey"
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreMisconfigured(
            f"the store's maxmemory-policy is {policy}, which drops sessions when memory is short:"
            " set it with CONFIG SET maxmemory-policy noeviction, and in the server's configuration"
        )


async def _run(
    pipeline: _Pipeline, calls: Sequence[ScriptCall], *, load: bool = False
) -> list[Reply | StoreError]:
    """One pipeline: EVALSHA, or EVAL to load what the server did not know."""
    for call in calls:
        script = ("EVAL", call.script.source) if load else ("EVALSHA", call.script.sha)
        pipeline.execute_command(*script, len(call.keys), *call.keys, *call.args)
    try:
        replies = await pipeline.execute(raise_on_error=False)
    except _FAILURES as error:
        return [_failure(error)] * len(calls)
    return [
        _failure(reply, call.script.name) if isinstance(reply, Exception) else reply
        for call, reply in zip(calls, replies, strict=True)
    ]


def _no_answer(timeout_s: float) -> StoreUnavailable:
    return StoreUnavailable(f"the store did not answer within {timeout_s:.3g} s")


def _failure(error: BaseException, script: str = "") -> StoreError:
    """What a failure of the client or an error of the server means to the store's users. Raises
    what is neither."""
    if isinstance(error.__cause__, errors.AuthenticationError):
        error = error.__cause__  # the client says ConnectionError
    match error:
        # So says uvloop of a write to a connection that was reset a moment before.
        case RuntimeError() if "handler is closed" not in str(error):
            raise error
        case errors.NoScriptError():
            return _ScriptUnknown("the store does not know a script")
        case errors.AuthenticationError() | errors.AuthorizationError():
            return StoreMisconfigured(f"the store refuses the credentials of its URL: {error}")
        case errors.NoPermissionError():
            return StoreMisconfigured(
                f"the store's user lacks a permission: {error}; see the operations guide for what"
                " Sessile's users need"
            )
        case errors.ReadOnlyError() | errors.OutOfMemoryError() | errors.AskError():
            return StoreUnavailable(f"the store cannot write now: {error}")
        case errors.ClusterError() | errors.TryAgainError() | errors.RedisClusterException():
            return StoreUnavailable(f"the cluster cannot serve this now: {error}")
        case errors.ResponseError() if not str(error).startswith(_TRANSIENT):
            return StoreCorrupt(f"script {script or '?'} failed: {error}")
        case _:
            return StoreUnavailable(f"no answer from the store: {error}")
