"""Fixtures shared by every test."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import TypeVarTuple, Unpack

import pytest
from hypothesis import settings

from tests.support.nightly import NIGHTLY, TIMEOUT_S, examples
from tests.support.servers import redis_binary, running_cluster, running_server, valkey_binary

Ts = TypeVarTuple("Ts")

# A limit for each example, as Hypothesis has it by default, is one for whatever else runs here.
settings.register_profile("usual", settings(), deadline=None)
settings.register_profile("nightly", max_examples=examples(100), deadline=None, print_blob=True)
settings.load_profile("nightly" if NIGHTLY else "usual")


class Loop(asyncio.SelectorEventLoop):
    """Takes nothing more once it is closed, without a complaint.

    gRPC has one queue of events per process: what is left of an earlier test's calls is handed to
    that test's loop by the present one, which would fail if that loop raised.
    """

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        if self.is_closed():
            return asyncio.Handle(callback, args, self, context)
        return super().call_soon_threadsafe(callback, *args, context=context)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """At night tests may take longer."""
    for item in items if NIGHTLY else ():
        item.add_marker(pytest.mark.timeout(TIMEOUT_S), append=False)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands of the command line set up the logging of their process, which is this one."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": Loop}


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
