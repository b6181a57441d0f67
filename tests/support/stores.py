"""Stores to run tests against: real servers, and the simulated one. All can lose their last writes
on demand, as a server does that fails over."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode

from loadtest.simulation.redis import LuaExecutor
from statestore import keys
from statestore.executor import Reply, Script, ScriptCall, ScriptExecutor
from statestore.ports import Append, AppendOutcome, StoreError, StoreUnavailable
from statestore.records import StoreLimits
from statestore.redis_executor import connect
from statestore.redis_store import RedisStore
from statestore.script_runner import RetryPolicy

BACKENDS = ("simulated", "lossy", "valkey", "redis", "cluster")
ANSWERING = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "lossy"], indirect=True
)
"""For tests of what is said only once (what a sweep did, that a turn begins already overdue)."""


class Backend(Protocol):
    """A server that forgets on demand."""

    @property
    def executor(self) -> ScriptExecutor: ...

    async def save(self) -> Any:
        """Everything it holds now."""
        ...

    async def roll_back(self, saved: Any) -> None:
        """Loses all writes since ``save``."""
        ...

    async def keys(self) -> set[str]: ...

    async def fields(self, key: str) -> set[bytes]:
        """Names of the fields of a hash."""
        ...


def store_on(backend: Backend, limits: StoreLimits | None = None) -> RedisStore:
    """A store that repeats unanswered calls at once. A server that only stands still for a moment
    has not left one unanswered: some things are said only once, and some calls are counted."""
    retry = RetryPolicy(attempt_timeout_s=30.0, total_timeout_s=30.0, first_delay_s=0)
    return PatientStore(backend.executor, limits=limits, retry=retry)


async def forgotten(backend: Backend, store: RedisStore, session_id: str = "ses_f") -> None:
    """Sweeps until the purges in the session's family are forgotten."""
    refs = keys.refs_key(session_id)
    while any(name.startswith(b"gone:") for name in await backend.fields(refs)):
        await store.sweep(10)


async def raw(backend: Backend, key: str, command: str, *args: bytes | str | int) -> Reply:
    """One command on one key, past all scripts: damages, or looks."""
    script = Script("raw", "return redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))")
    (reply,) = await backend.executor.execute([ScriptCall(script, (key,), (command, *args))], 5.0)
    if not isinstance(reply, StoreError):
        return reply
    (reply,) = await backend.executor.execute([ScriptCall(script, (key,), (command, *args))], 5.0)
    assert not isinstance(reply, StoreError), reply
    return reply


class LossyBackend:
    """Another backend whose every first answer is lost after the call was applied. Whoever repeats
    unanswered calls, as RedisStore does, must not notice."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.executor = LossyExecutor(inner.executor)
        self.save, self.roll_back = inner.save, inner.roll_back
        self.keys, self.fields = inner.keys, inner.fields


class LossyExecutor:
    def __init__(self, inner: ScriptExecutor) -> None:
        self._inner = inner
        self._repeated: tuple[ScriptCall, ...] = ()

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        replies = await self._inner.execute(calls, timeout_s)
        first = tuple(calls) != self._repeated
        self._repeated = tuple(calls) if first else ()
        return [StoreUnavailable("lost") for _ in calls] if first else replies

    async def aclose(self) -> None:
        await self._inner.aclose()


class CountingExecutor:
    """Another executor, with a note of what was sent."""

    def __init__(self, inner: ScriptExecutor) -> None:
        self._inner = inner
        self.round_trips: list[list[str]] = []
        """Names of the scripts of each pipeline."""

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        self.round_trips.append([call.script.name for call in calls])
        return await self._inner.execute(calls, timeout_s)

    async def aclose(self) -> None:
        await self._inner.aclose()


class PatientStore(RedisStore):
    """Repeats unanswered appends, as the journal does."""

    async def append_many(self, appends: Sequence[Append]) -> list[AppendOutcome | StoreError]:
        outcomes = await super().append_many(appends)
        if any(isinstance(outcome, StoreUnavailable) for outcome in outcomes):
            outcomes = await super().append_many(appends)
        return outcomes


class SimulatedBackend:
    """The scripts in process; time passes by a microsecond whenever it is asked for."""

    def __init__(self) -> None:
        clock = itertools.count(1_763_888_000_000_000)
        self.executor = LuaExecutor(lambda: next(clock))

    async def save(self) -> Any:
        return self.executor.snapshot()

    async def roll_back(self, saved: Any) -> None:
        self.executor.restore(saved)

    async def keys(self) -> set[str]:
        return {key.decode() for key in self.executor.snapshot()}

    async def fields(self, key: str) -> set[bytes]:
        value = self.executor.peek(key)
        return set(value) if isinstance(value, dict) else set()


class ServerBackend:
    """A real server or Cluster, with a connection of its own for raw commands."""

    def __init__(self, executor: ScriptExecutor, raw: Any) -> None:
        self.executor = executor
        self.raw = raw
        self._on_all = (
            {"target_nodes": RedisCluster.PRIMARIES} if isinstance(raw, RedisCluster) else {}
        )

    async def clear(self) -> None:
        await self.raw.flushall(**self._on_all)

    async def save(self) -> Any:
        return [(key, await self.raw.dump(key)) for key in sorted(await self._raw_keys())]

    async def roll_back(self, saved: Any) -> None:
        await self.clear()
        for key, value in saved:
            await self.raw.restore(key, 0, value)

    async def keys(self) -> set[str]:
        return {key.decode() for key in await self._raw_keys()}

    async def fields(self, key: str) -> set[bytes]:
        return set(await self.raw.hkeys(key))

    async def _raw_keys(self) -> list[bytes]:
        return [key async for key in self.raw.scan_iter()]


@asynccontextmanager
async def server_backend(url: str) -> AsyncIterator[ServerBackend]:
    """Connects to a server of the test session and clears it."""
    raw: Any
    if url.startswith("redis+cluster://"):
        host, _, port = url.removeprefix("redis+cluster://").split(",")[0].rpartition(":")
        raw = RedisCluster(startup_nodes=[ClusterNode(host, int(port))])
    else:
        raw = Redis.from_url(url)
    executor = await connect(url)
    backend = ServerBackend(executor, raw)
    try:
        await backend.clear()
        yield backend
    finally:
        await executor.aclose()
        await raw.aclose()
