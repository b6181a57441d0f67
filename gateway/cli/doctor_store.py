"""Checks of the store, of this machine's clock against it, and of the fleet that it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from gateway.cli.findings import Finding, failed, ok, warned
from statestore.connection import StoreAddress, StoreConnection, parse_address, redacted
from statestore.ports import StoreError, StoreMisconfigured, StoreUnavailable
from statestore.records import ReplicaRecord, StoreLimits
from statestore.replica_info import ReplicaDetails

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from statestore.executor import ScriptExecutor
    from statestore.redis_store import RedisStore

CLOCK_WARN_S = 1.0
"""Off by more, logs and traces of different machines cannot be read together."""
CLOCK_FAIL_S = 30.0
"""Off by more, tokens and certificates are judged wrongly (``security.jwt.leeway_s``)."""
FENCE_MS = 1000
"""Life of the key that is written to see whether one can be."""
NO_SESSION = "ses_doctor"
"""Is read to see whether scripts run; it need not be there."""
NOT_THIS_ONE = ("store kind", "store role")
"""Findings of a server after which nothing else it says matters."""
MAX_REPLICAS = 256
"""Of a fleet that are asked; the rest is told not to have been."""
ASKED_AT_ONCE = 16

Fleet = tuple[ReplicaRecord, ...]
Ask = Callable[[str], str]
"""Asks the replica at an endpoint; returns "" if it serves, or what is wrong. Blocks."""


async def examine(
    url: str,
    connection: StoreConnection,
    *,
    now: Callable[[], float],
    timeout_s: float,
    limits: StoreLimits | None,
) -> tuple[list[Finding], Fleet | None]:
    """What is to be said of a store, and the replicas registered in it (None: unknown, or
    ``limits`` is None, as for a worker, whose user may not list them). ``now`` gives Unix seconds
    of this machine."""
    from statestore.redis_clients import check_files
    from statestore.redis_failures import FAILURES, failure_to_connect

    address = parse_address(url, connection)
    findings: list[Finding] = []
    fleet: Fleet | None = None
    try:
        check_files(address, connection)
        async with _connected(address, connection) as (client, executor):
            with anyio.fail_after(timeout_s):
                infos = await _infos(client, address)
                findings.append(ok("store", f"{redacted(url)} answers"))
                for node, info in infos.items():
                    where = f" {node}" if len(infos) > 1 else ""
                    findings += judged(info, address.kind, connection.wait_replicas, where)
                if any(it.check.startswith(NOT_THIS_ONE) for it in findings):
                    return findings, None
                findings.append(await _clock(client, address, now))
                findings.append(await _writes(client))
            store = _store(executor, limits, timeout_s)
            # Scripts, as processes run them: what the user may not do shows here.
            await store.get_session(NO_SESSION)
            findings.append(ok("store scripts", "run"))
            if limits is not None:
                fleet = await store.fleet()
    except TimeoutError:
        findings.append(_unreachable(f"{redacted(url)} did not answer within {timeout_s:g} s"))
    except (*FAILURES, StoreError) as error:
        meaning = (
            error if isinstance(error, StoreError) else failure_to_connect(error, tls=address.tls)
        )
        findings.append(refused(meaning, redacted(url)))
    return findings, fleet


def refused(error: StoreError, url: str) -> Finding:
    """A store that cannot be used. Its messages have their fix behind a semicolon."""
    detail, _, fix = str(error).partition("; ")
    if isinstance(error, StoreUnavailable):
        return _unreachable(f"{url}: {error}")
    if isinstance(error, StoreMisconfigured):
        return failed("store", f"{url}: {detail}", fix or "Correct redis_url and [redis].")
    return failed("store", f"{url}: {error}", "Look at the store's log.")


def _unreachable(detail: str) -> Finding:
    return failed(
        "store",
        detail,
        "Start the store, or correct redis_url (SESSILE_REDIS), or the network between.",
    )


def judged(
    info: Mapping[str, Any], kind: str, wait_replicas: int, where: str = ""
) -> Iterator[Finding]:
    """What a server's INFO says. ``kind``: of the URL; ``where``: which node, of several."""
    from statestore.redis_failures import OLDEST_VERSION

    if info.get("redis_mode") == "sentinel":
        yield failed(
            f"store kind{where}",
            "this is a Sentinel, no store",
            "Write its URL as redis+sentinel://host:port/service.",
        )
        return
    clustered = bool(int(info.get("cluster_enabled", 0)))
    if clustered != (kind == "cluster"):
        yield failed(
            f"store kind{where}",
            "the store is a Cluster" if clustered else "the store is no Cluster",
            "Begin its URL with redis+cluster://."
            if clustered
            else "Leave +cluster out of its URL.",
        )
    if info.get("role") == "slave":
        yield failed(
            f"store role{where}",
            f"it is a replica of {info.get('master_host')}:{info.get('master_port')}, which takes"
            " no writes",
            "Let the URL lead to the primary.",
        )
    version = str(info.get("redis_version", "0"))
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    if int(version.partition(".")[0]) < OLDEST_VERSION:
        yield failed(
            f"store version{where}", name, f"Use Redis {OLDEST_VERSION} or newer, or Valkey."
        )
    else:
        yield ok(f"store version{where}", name)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        yield ok(f"store eviction{where}", policy)
    else:
        yield failed(
            f"store eviction{where}",
            f"maxmemory-policy is {policy}, which drops sessions when memory is short",
            "CONFIG SET maxmemory-policy noeviction, and in the server's configuration.",
        )
    yield _durability(info, wait_replicas, where)


def _durability(info: Mapping[str, Any], wait_replicas: int, where: str) -> Finding:
    check = f"store durability{where}"
    file = bool(int(info.get("aof_enabled", 0)))
    replicas = int(info.get("connected_slaves", 0))
    written = str(info.get("aof_last_write_status", "ok"))
    if file and written != "ok":
        return failed(
            check,
            f"the last write of the append-only file: {written}",
            "Look at the server's log and at the room on its disk.",
        )
    detail = f"append-only file {'on' if file else 'off'}, {replicas} replicas"
    if replicas < wait_replicas:
        return failed(
            check,
            f"{detail}; wait_replicas is {wait_replicas}: turns wait until there are so many",
            "Bring the replicas back, or lower redis.wait_replicas.",
        )
    if not file and not replicas:
        return warned(
            check,
            f"{detail}: acknowledged tokens end with this server",
            "Set appendonly yes, or add replicas (docs/STORE.md says what each survives).",
        )
    return ok(check, detail)


def clock_finding(offset_s: float, uncertainty_s: float) -> Finding:
    """``offset_s``: the store's clock less this machine's, known to ± ``uncertainty_s``."""
    check = "clock"
    least = max(abs(offset_s) - uncertainty_s, 0.0)
    ahead = "behind" if offset_s > 0 else "ahead of"
    if least < CLOCK_WARN_S:
        return ok(check, f"within {abs(offset_s) + uncertainty_s:.3f} s of the store's")
    detail = f"this machine's clock is {abs(offset_s):.1f} s {ahead} the store's"
    fix = "Have both set by NTP (`timedatectl`, `chronyc tracking` show whether they are)."
    return failed(check, detail, fix) if least > CLOCK_FAIL_S else warned(check, detail, fix)


async def check_fleet(fleet: Fleet, ask: Ask) -> list[Finding]:
    """Asks every registered replica whether it serves."""
    present = [record for record in fleet if not record.gone]
    if not present:
        fix = "Start workers (`sessile worker`) on this store."
        return [warned("fleet", "no replica is registered", fix)]
    asked = present[:MAX_REPLICAS]
    findings: dict[str, Finding] = {}
    slots = anyio.CapacityLimiter(ASKED_AT_ONCE)

    async def one(record: ReplicaRecord) -> None:
        findings[record.ref.replica_id] = await anyio.to_thread.run_sync(
            _asked, record, ask, limiter=slots
        )

    async with anyio.create_task_group() as tasks:
        for record in asked:
            tasks.start_soon(one, record)
    told = [findings[record.ref.replica_id] for record in asked]
    if len(present) > len(asked):
        rest = len(present) - len(asked)
        told.append(warned("fleet", f"{rest} more replicas were not asked", "sessile replicas ls"))
    return told


def _asked(record: ReplicaRecord, ask: Ask) -> Finding:
    check = f"replica {record.ref.replica_id}"
    try:
        details = ReplicaDetails.from_json(record.details)
    except ValueError as error:
        return failed(check, f"its registration cannot be read: {error}", "Restart that worker.")
    if not details.speaks_with_us:
        return failed(
            check,
            f"it speaks versions {details.protocol_min} to {details.protocol_max} of the protocol,"
            " which this one does not",
            "Upgrade the older side.",
        )
    if wrong := ask(details.endpoint):
        judged = warned if record.draining else failed  # one that ends is not ready, as it should
        return judged(
            check,
            f"{details.endpoint}: {wrong}",
            "Look whether it runs (it is forgotten by itself if not), at its log, at"
            " advertise_host, and at the certificates of both sides.",
        )
    draining = ", draining" if record.draining else ""
    return ok(check, f"{details.endpoint} serves {details.model} ({details.engine}){draining}")


@asynccontextmanager
async def _connected(
    address: StoreAddress, connection: StoreConnection
) -> AsyncIterator[tuple[Any, ScriptExecutor]]:
    """A client, and an executor that owns it."""
    from statestore.cluster_executor import ClusterExecutor
    from statestore.redis_clients import cluster_client, sentinel_client, server_client
    from statestore.redis_executor import ServerExecutor

    client: Any
    sentinels: Sequence[Any] = ()
    executor: ServerExecutor | ClusterExecutor
    if address.kind == "cluster":
        client = cluster_client(address, connection)
        executor = ClusterExecutor(client)
    else:
        if address.kind == "sentinel":
            client, sentinels = sentinel_client(address, connection)
        else:
            client = server_client(address, connection)
        executor = ServerExecutor(client, sentinels)
    try:
        yield client, executor
    finally:
        with anyio.CancelScope(shield=True):
            await executor.aclose()


async def _infos(client: Any, address: StoreAddress) -> dict[str, Any]:
    """INFO of the server, or of every primary of a Cluster, by its name."""
    if address.kind != "cluster":
        return {"": await client.info()}
    await client.initialize()
    return {str(node.name): await client.info(target_nodes=node) for node in client.get_primaries()}


async def _clock(client: Any, address: StoreAddress, now: Callable[[], float]) -> Finding:
    """Of several nodes the one that is furthest off."""
    worst = (0.0, 0.0)
    nodes = [None] if address.kind != "cluster" else client.get_primaries()
    for node in nodes:
        before = now()
        seconds, micros = await (client.time() if node is None else client.time(target_nodes=node))
        after = now()
        offset = seconds + micros / 1e6 - (before + after) / 2
        worst = max(worst, (offset, abs(after - before) / 2), key=lambda it: abs(it[0]))
    return clock_finding(*worst)


async def _writes(client: Any) -> Finding:
    """Writes a key that nobody reads, which both users of deploy/redis/users.acl may."""
    from redis.exceptions import RedisError

    from statestore import keys
    from statestore.redis_failures import failure

    try:
        await client.set(keys.fence_key("0"), "", px=FENCE_MS)
    except RedisError as error:
        detail, _, fix = str(failure(error)).partition("; ")
        return failed("store writes", detail, fix or "Look at the store's log and memory.")
    return ok("store writes", "accepted")


def _store(executor: ScriptExecutor, limits: StoreLimits | None, timeout_s: float) -> RedisStore:
    from statestore.redis_store import RedisStore
    from statestore.script_runner import RetryPolicy

    retry = RetryPolicy(attempt_timeout_s=timeout_s, total_timeout_s=timeout_s)
    return RedisStore(executor, limits=limits, retry=retry)
