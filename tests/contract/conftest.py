"""One suite for every store: each test of it runs on all backends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from statestore.redis_store import RedisStore
from tests.support.stores import Backend, SimulatedBackend, server_backend, store_on


@pytest.fixture(params=["simulated", "valkey", "redis", "cluster"])
async def backend(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Backend]:
    if request.param == "simulated":
        yield SimulatedBackend()
        return
    async with server_backend(request.getfixturevalue(f"{request.param}_url")) as server:
        yield server


@pytest.fixture
async def store(backend: Backend) -> RedisStore:
    return store_on(backend)
