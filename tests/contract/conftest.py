"""One suite for every store: each test of it runs on all backends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from statestore.redis_store import RedisStore
from tests.support.store_servers import Certificates
from tests.support.stores import (
    BACKENDS,
    Backend,
    LossyBackend,
    SimulatedBackend,
    server_backend,
    store_on,
)


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Backend]:
    if request.param in ("simulated", "lossy"):
        simulated = SimulatedBackend()
        yield LossyBackend(simulated) if request.param == "lossy" else simulated
        return
    async with server_backend(request.getfixturevalue(f"{request.param}_url")) as server:
        yield server


@pytest.fixture
async def store(backend: Backend) -> RedisStore:
    return store_on(backend)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of servers on the loopback interface, and of a client."""
    return Certificates.made(tmp_path_factory.mktemp("certificates"))
