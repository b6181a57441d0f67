"""A Cluster whose slots move under load: callers see no error, and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from redis.crc import key_slot

from statestore import keys
from statestore.ports import Appended, SessionWritten, StoreUnavailable
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.script_runner import RetryPolicy
from tests.support.owners import Owner, check_whole, new_session
from tests.support.servers import redis_binary, valkey_binary
from tests.support.store_servers import StoreServer, cluster_url, running_nodes, valkey8_binary

pytestmark = pytest.mark.anyio

SESSIONS = [f"ses_{i}" for i in range(12)]
"""On all three nodes."""


@pytest.fixture(
    params=[redis_binary, valkey8_binary, valkey_binary], ids=["redis7", "valkey8", "valkey9"]
)
def nodes(request: pytest.FixtureRequest) -> Iterator[list[StoreServer]]:
    with running_nodes(request.param()) as servers:
        yield servers


class Move:
    """A slot on its way from the node that has it to the next one, step by step."""

    def __init__(self, nodes: list[StoreServer], session_id: str) -> None:
        self._nodes = nodes
        self._clients: list[Any] = [node.raw for node in nodes]
        key = keys.session_key(session_id)
        self._slot = self._clients[0].cluster("keyslot", key)
        self._source = next(i for i, client in enumerate(self._clients) if self._has(client))
        self._target = (self._source + 1) % len(nodes)

    def _has(self, client: Any) -> bool:
        return int(client.cluster("countkeysinslot", self._slot)) > 0

    def begin(self) -> None:
        ids = [client.cluster("myid").decode() for client in self._clients]
        self._ids = ids
        self._set(self._target, "IMPORTING", ids[self._source])
        self._set(self._source, "MIGRATING", ids[self._target])

    def take_keys(self, names: list[bytes] | None = None) -> None:
        """Moves these keys, or all that are left."""
        source = self._clients[self._source]
        left = names or source.cluster("getkeysinslot", self._slot, 1000)
        port = self._nodes[self._target].port
        for name in left:
            source.execute_command("MIGRATE", "127.0.0.1", port, name, 0, 5000)

    def end(self) -> None:
        for node in (self._target, self._source, *range(len(self._nodes))):
            self._set(node, "NODE", self._ids[self._target])
        for client in self._clients:
            client.close()

    def _set(self, node: int, *what: object) -> None:
        self._clients[node].execute_command("CLUSTER", "SETSLOT", self._slot, *what)

    @property
    def refused(self) -> int:
        """Calls that were answered ASK or MOVED."""
        found = 0
        for client in self._clients:
            stats = client.info("errorstats")
            found += sum(
                stats.get(f"errorstat_{e}", {"count": 0})["count"] for e in ("ASK", "MOVED")
            )
        return found


async def test_slots_move_under_load(nodes: list[StoreServer]) -> None:
    """Each slot: its keys move one by one while all sessions are written."""
    executor = await connect(cluster_url(nodes))
    store = RedisStore(executor)
    owners = [await Owner.of(store, session_id) for session_id in SESSIONS]
    for owner in owners:
        await owner.begun()
    assert all(_has_sessions(node) for node in nodes)
    done = anyio.Event()

    async def write() -> None:
        token = 10
        while not done.is_set():
            appends = [owner.append(token) for owner in owners]
            outcomes = await store.append_many(appends)
            while missing := [i for i, o in enumerate(outcomes) if isinstance(o, StoreUnavailable)]:
                # As the journal does: again and unchanged.
                again = await store.append_many([appends[i] for i in missing])
                for i, outcome in zip(missing, again, strict=True):
                    outcomes[i] = outcome
            assert outcomes == [Appended(append.head) for append in appends]
            token += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        for session_id in SESSIONS[:6]:
            move = Move(nodes, session_id)
            for step in (move.begin, move.take_keys, move.end):
                await anyio.to_thread.run_sync(step)
                count = len(owners[0].tokens)
                with anyio.fail_after(10):
                    while len(owners[0].tokens) < count + 2:  # noqa: ASYNC110
                        await anyio.sleep(0.002)
        done.set()
    for owner in owners:
        await check_whole(store, owner)
    await executor.aclose()


async def test_a_slot_that_takes_long_to_move_stops_no_session_in_it(
    nodes: list[StoreServer],
) -> None:
    """Neither one whose keys are gone already nor one whose keys are still there. Only a new one
    waits for the end: a server takes no several keys that are not there yet into a moving slot."""
    executor = await connect(cluster_url(nodes))
    store = RedisStore(executor)
    gone, there, new = _of_one_slot(3)
    first, second = [await Owner.of(store, session_id) for session_id in (gone, there)]
    for owner in (first, second):
        await owner.begun()
    move = Move(nodes, gone)
    move.begin()
    names = [keys.session_key(gone), keys.ledger_key(gone), keys.refs_key(gone)]
    move.take_keys([name.encode() for name in names])
    for owner in (first, second):
        for token in range(20, 30):
            assert await owner.write(token) == Appended(owner.head)
    assert move.refused > 0
    once = RetryPolicy(attempt_timeout_s=30.0, total_timeout_s=30.0, first_delay_s=60.0)
    hasty = RedisStore(executor, retry=once)
    with pytest.raises(StoreUnavailable, match="rehashing of slot"):
        await hasty.open_session(new_session(new))
    move.take_keys()
    move.end()
    assert isinstance(await store.open_session(new_session(new)), SessionWritten)
    for owner in (first, second):
        assert await owner.write(40) == Appended(owner.head)
        await check_whole(store, owner)
    await executor.aclose()


def _has_sessions(node: StoreServer) -> bool:
    with node.raw as client:
        return bool(client.keys("*:s:ses_*"))


def _of_one_slot(count: int) -> list[str]:
    """Sessions of different families in one slot."""
    found = (f"f{i}" for i in itertools.count() if key_slot(b"f%d" % i) == key_slot(b"f0"))
    return [f"ses_{family}" for family in itertools.islice(found, count)]
