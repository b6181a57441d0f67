"""The pytest fixtures, there wherever ``sessile-server`` is installed.

    async def test_my_agent(sessile_server, sessile_client):
        sessile_server.will_say("It is warm.")
        async with sessile_client as client:
            assert await my_agent(client) == "It is warm."

Nothing of the server is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import sessile.sync

    from gateway.testing.server import LocalServer


@pytest.fixture
def sessile_server_options() -> dict[str, Any]:
    """Arguments of ``gateway.testing.LocalServer``, such as ``{"replicas": 2}``; override it."""
    return {}


@pytest.fixture
def sessile_server(sessile_server_options: dict[str, Any]) -> Iterator[LocalServer]:
    """A server of the test's own, with nothing in it: a ``gateway.testing.LocalServer``."""
    from gateway.testing.server import LocalServer

    with LocalServer(**sessile_server_options) as server:
        yield server


@pytest.fixture
def sessile_client(sessile_server: LocalServer) -> sessile.Sessile:
    """A client of ``sessile_server``, to be entered by ``async with`` in the test: so it is of the
    test's event loop, whatever runs that."""
    return sessile_server.client()


@pytest.fixture
def sessile_sync_client(sessile_server: LocalServer) -> Iterator[sessile.sync.Sessile]:
    """A client for tests without an event loop, entered already."""
    with sessile_server.sync_client() as client:
        yield client
