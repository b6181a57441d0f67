"""The users of deploy/redis/users.acl on a real server: what each may, and what not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from statestore import keys
from statestore.connection import StoreConnection
from statestore.executor import Reply, Script, ScriptCall, ScriptExecutor
from statestore.ports import StoreError, StoreMisconfigured, StoreUnavailable
from statestore.records import ReplicaRef
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.scripts import load_script, script_names
from tests.support.owners import A, Owner, check_whole
from tests.support.servers import redis_binary, valkey_binary
from tests.support.store_servers import ACL_FILE, StoreServer, users_file
from tests.support.store_smoke import visit_every_script
from tests.support.stores import CountingExecutor

pytestmark = pytest.mark.anyio

GATEWAY, WORKER = "sessile-gateway", "sessile-worker"
WORKER_SCRIPTS = {
    "append",
    "begin",
    "due",
    "heartbeat",
    "index_add",
    "mark_replica",
    "read_ledger",
    "read_session",
    "read_turns",
    "register",
    "repair",
    "resume",
    "tenant_salt",
    "usage_add",
}
"""What workers run; gateways run all others, and some of these."""


def password(name: str) -> str:
    return f"of {name}: ü/@?"


@pytest.fixture(scope="module", params=[redis_binary, valkey_binary], ids=["redis7", "valkey9"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreServer]:
    directory = tmp_path_factory.mktemp("users")
    binary: Callable[[], str] = request.param
    users = users_file(directory, password)
    with StoreServer(binary(), ("--aclfile", str(users))) as running:
        yield running


@pytest.fixture
async def gateway(server: StoreServer, anyio_backend: str) -> AsyncIterator[ScriptExecutor]:
    executor = await _as(server, GATEWAY)
    yield executor
    await executor.aclose()


@pytest.fixture
async def worker(server: StoreServer, anyio_backend: str) -> AsyncIterator[ScriptExecutor]:
    executor = await _as(server, WORKER)
    yield executor
    await executor.aclose()


async def _as(server: StoreServer, name: str) -> ScriptExecutor:
    return await connect(
        server.url, StoreConnection(username=name, password=password(name), wait_timeout_ms=1)
    )


class Roles:
    """Each script as the user of the process that runs it."""

    def __init__(self, gateway: ScriptExecutor, worker: ScriptExecutor) -> None:
        self._gateway = gateway
        self._worker = worker

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        results: list[Reply | StoreError] = []
        for call in calls:
            of_worker = call.script.name in WORKER_SCRIPTS and "tenant-sessions" not in call.keys[0]
            by = self._worker if of_worker else self._gateway
            results += await by.execute([call], timeout_s)
        return results

    async def aclose(self) -> None:
        pass


async def test_the_users_together_run_every_script(
    gateway: ScriptExecutor, worker: ScriptExecutor
) -> None:
    await visit_every_script(CountingExecutor(Roles(gateway, worker)))


async def test_nobody_logs_in_before_passwords_are_set(tmp_path: Path) -> None:
    with StoreServer(redis_binary(), ("--aclfile", str(ACL_FILE))) as server:
        for name in ("default", GATEWAY, WORKER):
            with pytest.raises(StoreMisconfigured, match="refuses the credentials"):
                await connect(server.url, StoreConnection(username=name, password=""))
            with pytest.raises(StoreMisconfigured, match="refuses the credentials"):
                await connect(server.url, StoreConnection(username=name, password="0" * 64))


async def test_a_restart_reads_everything_back_from_the_file(tmp_path: Path) -> None:
    """A server plays its append-only file as its default user: with fewer permissions than all,
    even if nobody can log in as that user, Redis 7.0 drops every transaction in it."""
    options = ("--aclfile", str(users_file(tmp_path, password)), "--appendonly", "yes")
    with StoreServer(redis_binary(), (*options, "--appendfsync", "always")) as server:
        executor = await _as(server, GATEWAY)
        owner = await Owner.of(RedisStore(executor))
        await owner.run_turn("t1", [4, 5])
        await executor.aclose()
        server.kill()
        server.start()
        executor = await _as(server, GATEWAY)
        await check_whole(RedisStore(executor), owner)
        await executor.aclose()


def test_each_user_has_the_commands_of_its_scripts_and_no_others() -> None:
    connecting = {"ping", "info", "select", "cluster|slots", "command", "asking", "wait"}
    connecting |= {"eval", "evalsha"}
    for name, scripts in ((GATEWAY, set(script_names())), (WORKER, WORKER_SCRIPTS)):
        (line,) = [line for line in ACL_FILE.read_text().splitlines() if f" {name} " in line]
        allowed = set(re.findall(r"\+(\S+?)[\s)]", line + " "))
        source = "".join(load_script(script).source for script in scripts)
        prelude = load_script("abort_migration").source
        needed = {command.lower() for command in re.findall(r"call\('([A-Z]+)'", source)}
        unused = {"exists", "strlen"} if name == WORKER else set()
        assert "call('EXISTS'" in prelude  # every script brings it, no worker's comes there
        assert allowed - connecting == needed - (unused - allowed)


@pytest.mark.parametrize(
    ("name", "source", "key"),
    [
        (GATEWAY, "return redis.call('FLUSHALL')", keys.FLEET),
        (GATEWAY, "return redis.call('KEYS', '*')", keys.FLEET),
        (GATEWAY, "return redis.call('GET', KEYS[1])", "other:key"),
        (WORKER, "return redis.call('FLUSHALL')", keys.FLEET),
        (WORKER, "return redis.call('GET', KEYS[1])", "other:key"),
        (WORKER, "return redis.call('DEL', KEYS[1])", keys.session_key("ses_f")),
        (WORKER, "return redis.call('DEL', KEYS[1])", keys.ledger_key("ses_f")),
        (WORKER, "return redis.call('HSET', KEYS[1], 'n:ses_f', 0)", keys.refs_key("ses_f")),
        (WORKER, "return redis.call('ZREM', KEYS[1], 'ses_f')", keys.DUE),
        (WORKER, "return redis.call('ZREM', KEYS[1], 'ses_f')", keys.replica_index_key(A)),
        (WORKER, "return redis.call('HDEL', KEYS[1], 'inc:a')", keys.FLEET),
        (WORKER, "return redis.call('HGETALL', KEYS[1])", keys.lease_key("sweep")),
        (WORKER, "return redis.call('ZADD', KEYS[1], 1, 'x')", keys.tenant_index_key("acme")),
    ],
)
async def test_what_a_user_does_not_need_is_refused(
    gateway: ScriptExecutor, worker: ScriptExecutor, name: str, source: str, key: str
) -> None:
    by = gateway if name == GATEWAY else worker
    (result,) = await by.execute([ScriptCall(Script("bad", source), (key,), ())], 5)
    assert isinstance(result, StoreMisconfigured), result
    assert "deploy/redis/users.acl" in str(result)


@pytest.mark.parametrize("name", [GATEWAY, WORKER, "sessile-operator"])
def test_no_user_may_change_the_server(server: StoreServer, name: str) -> None:
    client: Any = redis.Redis(port=server.port, username=name, password=password(name))
    for command in (
        "FLUSHALL",
        "SHUTDOWN NOSAVE",
        "CONFIG SET maxmemory-policy allkeys-lru",
        "ACL LIST",
        "DEBUG SLEEP 0",
        "KEYS *",
        "SCRIPT FLUSH",
        "REPLICAOF NO ONE",
        "GET other",
    ):
        with pytest.raises((redis.exceptions.NoPermissionError, redis.exceptions.ResponseError)):
            client.execute_command(*command.split())
    client.close()


async def test_the_operator_reads_no_session(server: StoreServer) -> None:
    name = "sessile-operator"
    client = redis.Redis(port=server.port, username=name, password=password(name))
    assert client.info("memory")["used_memory"] > 0
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.hgetall(keys.session_key("ses_f"))
    client.close()


async def test_waiting_for_replicas_needs_no_more(server: StoreServer) -> None:
    """It gets as far as to know that there are none."""
    call = ScriptCall(load_script("fleet"), (keys.FLEET,), (1000,))
    for name in (GATEWAY, WORKER):
        settings = StoreConnection(
            username=name, password=password(name), wait_replicas=1, wait_timeout_ms=1
        )
        executor = await connect(server.url, settings)
        mark = ScriptCall(
            load_script("mark_replica"),
            (keys.FLEET,),
            ("x", ReplicaRef("x", 1).incarnation, "gone", 1),
        )
        (result,) = await executor.execute([mark if name == WORKER else call], 5)
        assert isinstance(result, StoreUnavailable), result
        assert "0 of 1 replicas" in str(result)
        await executor.aclose()


async def test_a_changed_password_file_is_read_with_the_next_connection(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("first\n")
    with StoreServer(valkey_binary(), ("--requirepass", "first")) as server:
        executor = await connect(server.url, StoreConnection(password_file=path))
        with redis.Redis(port=server.port, password="first") as client:
            client.config_set("requirepass", "second")
            path.write_text("second\n")
            client.client_kill_filter(_type="normal", skipme=True)
        one = ScriptCall(Script("one", "return 1"), ("k",), ())
        await executor.execute([one], 5)
        assert await executor.execute([one], 5) == [1]
        await executor.aclose()
