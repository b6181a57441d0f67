"""Tests with the real sglang on the CPU, which takes half a minute to start: engines are started
once and shared. ``make test-sglang`` makes the environment and runs them."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.conftest import Loop
from tests.sglang.engines import SharedEngines

collect_ignore_glob = [] if importlib.util.find_spec("sglang") else ["test_*.py"]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": Loop}


@pytest.fixture(scope="session")
async def engines(anyio_backend: object) -> AsyncIterator[SharedEngines]:
    """Real engines for the whole session, all on its loop."""
    async with AsyncExitStack() as stack:
        yield SharedEngines(stack)
