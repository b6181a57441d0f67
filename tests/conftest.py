"""Fixtures shared by every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import redis_binary, running_cluster, running_server, valkey_binary


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A Valkey for the whole test session; a test clears it before it uses it."""
    with running_server(valkey_binary()) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The same with an installed Redis."""
    with running_server(redis_binary()) as url:
        yield url


@pytest.fixture(scope="session")
def cluster_url() -> Iterator[str]:
    """The same with a Cluster of three."""
    with running_cluster() as url:
        yield url
