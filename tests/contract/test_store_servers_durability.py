"""What is still there after SIGKILL of the store's process, by how it is set up. A kill is not a
power cut: the machine's page cache survives it."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

import anyio
import pytest

from statestore.connection import StoreConnection
from statestore.ports import Appended, StoreUnavailable
from statestore.records import Session
from statestore.redis_executor import connect, connect_when_there
from statestore.redis_store import RedisStore
from tests.support.owners import Owner, check_whole, session_of
from tests.support.servers import redis_binary, valkey_binary, wait_for
from tests.support.store_servers import StoreServer, in_sync, lose, replica_of, sentinel_of

pytestmark = pytest.mark.anyio

ROUNDS = 3
TOKENS = range(100, 130)


async def appended(url: str, connection: StoreConnection | None = None) -> Owner:
    """An owner whose every append is acknowledged; the last one a moment ago."""
    executor = await connect(url, connection)
    owner = await Owner.of(RedisStore(executor))
    await owner.begun()
    for token in TOKENS:
        assert await owner.write(token) == Appended(owner.head)
    await executor.aclose()
    return owner


async def check_nothing_lost(url: str, owner: Owner) -> None:
    executor = await connect(url)
    await check_whole(RedisStore(executor), owner)
    await executor.aclose()


@pytest.mark.parametrize("binary", [redis_binary, valkey_binary], ids=["redis7", "valkey9"])
@pytest.mark.parametrize("fsync", ["always", "everysec"])
async def test_a_killed_server_has_every_acknowledged_write_in_its_file(
    fsync: str, binary: Callable[[], str]
) -> None:
    """With everysec a server holds writes back while a slow fsync is under way, 2 s at most, and
    acknowledges them all the same: those a kill takes with it, so the test waits for them."""
    with StoreServer(binary(), ("--appendonly", "yes", "--appendfsync", fsync)) as server:
        for _ in range(ROUNDS):
            with server.raw as client:
                client.flushall()
            owner = await appended(server.url)
            if fsync == "everysec":
                wait_for(lambda: _written_out(server))
            server.kill()
            server.start()
            await check_nothing_lost(server.url, owner)


async def test_without_a_file_and_replicas_a_kill_loses_all() -> None:
    """So the tests above can fail."""
    with StoreServer(valkey_binary()) as server:
        await appended(server.url)
        server.kill()
        server.start()
        executor = await connect(server.url)
        assert await RedisStore(executor).get_session("ses_f") is None
        await executor.aclose()


@pytest.mark.parametrize("binary", [redis_binary, valkey_binary], ids=["redis7", "valkey9"])
async def test_what_a_replica_has_acknowledged_survives_the_primary(
    binary: Callable[[], str],
) -> None:
    """wait_replicas = 1: the primary is killed right after an answer, and the replica promoted."""
    for _ in range(ROUNDS):
        with StoreServer(binary()) as primary, replica_of(primary) as replica:
            in_sync(primary, 1)
            owner = await appended(primary.url, StoreConnection(wait_replicas=1))
            primary.kill()
            with replica.raw as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            await check_nothing_lost(replica.url, owner)


async def test_a_repeat_waits_too_for_what_was_written_before() -> None:
    """The write was applied, its answer lost: the repeat writes nothing, yet its answer must not
    count before the replica has the write."""
    with StoreServer(valkey_binary()) as primary, replica_of(primary) as replica:
        in_sync(primary, 1)
        plain = RedisStore(await connect(primary.url))
        waiting = RedisStore(
            await connect(primary.url, StoreConnection(wait_replicas=1, wait_timeout_ms=50))
        )
        owner = await Owner.of(plain)
        await owner.begun()
        assert replica.process is not None
        replica.process.send_signal(signal.SIGSTOP)  # connected, and behind from now on
        append = owner.append(7)
        assert await plain.append_many([append]) == [Appended(owner.head)]
        (outcome,) = await waiting.append_many([append])
        assert isinstance(outcome, StoreUnavailable)
        assert "0 of 1 replicas" in str(outcome)
        (outcome,) = await waiting.append_many([append])  # on a connection that wrote before
        assert isinstance(outcome, StoreUnavailable)
        replica.process.send_signal(signal.SIGCONT)
        with anyio.fail_after(10):
            while await waiting.append_many([append]) != [Appended(owner.head)]:
                pass
        for store in (plain, waiting):
            await store.aclose()


async def test_a_sentinel_fails_over_under_load_and_loses_nothing_acknowledged() -> None:
    """Two replicas that must both have each write (wait_replicas = 2), a primary that takes none
    with fewer than one (min-replicas-to-write): whichever is promoted has all. Two are left then,
    so that one replica is waited for from there on."""
    safe = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "2")
    with ExitStack() as stack:
        primary = stack.enter_context(StoreServer(redis_binary(), safe))
        replicas = [stack.enter_context(replica_of(primary, *safe)) for _ in range(2)]
        in_sync(primary, 2)
        sentinel = stack.enter_context(sentinel_of(primary))
        with sentinel.raw as client:
            wait_for(lambda: len(client.execute_command("SENTINEL REPLICAS", "main")) == 2)
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        executor = await connect(url, StoreConnection(wait_replicas=2))
        owner = await Owner.of(RedisStore(executor))
        await owner.begun()
        for token in TOKENS:
            assert await owner.write(token) == Appended(owner.head)
        lose(primary, sentinel)
        append = owner.append(1)
        (outcome,) = await owner.store.append_many([append])
        assert isinstance(outcome, StoreUnavailable)
        await executor.aclose()

        wait_for(lambda: any(_is_primary(server) for server in replicas))
        executor = await connect_when_there(url, StoreConnection(wait_replicas=1))
        store = RedisStore(executor)
        with anyio.fail_after(30):
            session = await _when_answered(lambda: session_of(store, "ses_f"))
            assert session.head.length >= append.expected.length
            while await store.append_many([append]) != [Appended(owner.head)]:
                pass
        await check_whole(store, owner)
        await executor.aclose()


async def _when_answered(read: Callable[[], Awaitable[Session]]) -> Session:
    """The replicas of a new primary take a while until they acknowledge."""
    while True:
        with suppress(StoreUnavailable):
            return await read()


def _written_out(server: StoreServer) -> bool:
    with server.raw as client:
        return int(client.info("persistence")["aof_buffer_length"]) == 0


def _is_primary(server: StoreServer) -> bool:
    with server.raw as client:
        return str(client.info("replication")["role"]) == "master"
