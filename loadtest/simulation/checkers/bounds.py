"""Samples the sizes of tables and queues of every live process against their named bounds (I8)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import anyio

from loadtest.simulation.world import SimGateway, SimReplica, World
from statestore.replica_info import MAX_LEADING

PERIOD_S = 0.25
LEFT_BY_NOBODY = frozenset({"open streams", "dispatches"})

Size = tuple[str, int, int]
"""What it is, how large it is, and its bound."""


class Bounds:
    """``violations`` are found while :meth:`watched` is open; one for each table. ``also`` are
    called with each sample."""

    def __init__(self, world: World, also: Sequence[Callable[[], None]]) -> None:
        self._world = world
        self._also = also
        self._found: dict[str, str] = {}

    @property
    def violations(self) -> list[str]:
        return list(self._found.values())

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Samples all the while."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._sample_for_ever, name="bounds")
            yield
            tasks.cancel_scope.cancel()

    async def _sample_for_ever(self) -> None:
        while True:
            for gateway in self._world.live_gateways():
                self._judge(gateway.name, _sizes_of_gateway(gateway))
            for replica in self._world.live_replicas():
                self._judge(replica.name, _sizes_of_replica(self._world, replica))
            for sample in self._also:
                sample()
            await anyio.sleep(PERIOD_S)

    def _judge(self, name: str, sizes: Iterator[Size]) -> None:
        for what, size, bound in sizes:
            if size > bound:
                self._found.setdefault(what, f"{name}: I8: {size} {what}, at most {bound} allowed")


def check_idle(world: World) -> list[str]:
    """No gateway counts a stream or a dispatch when no client is there any more (I8)."""
    return [
        f"{gateway.name}: I8: {size} {what} are left"
        for gateway in world.live_gateways()
        for what, size, _ in _sizes_of_gateway(gateway)
        if size and what in LEFT_BY_NOBODY
    ]


def _sizes_of_gateway(gateway: SimGateway) -> Iterator[Size]:
    app, config = gateway.app, gateway.app.config
    directory = app.turns._services.directory
    yield "open streams", app.turns.open_streams, config.admission.max_streams
    yield "remembered owners", len(directory._known), config.tables.owners
    yield "remembered salts", len(directory._salts), config.tables.salts
    yield "dispatches", len(app.fleet._attempts), config.admission.max_streams


def _sizes_of_replica(world: World, replica: SimReplica) -> Iterator[Size]:
    engine, app = replica.engine, replica.app
    assert app is not None
    turns = world.engine.max_running + world.engine.max_queued
    load, residency = engine.load(), app._ports.residency
    yield "generations", load.running + load.queued, turns
    yield "running turns", len(app._runs), turns
    yield "receivers of steps", len(app._ports.dispatcher._receivers), turns
    # Sessions with a running turn are never evicted.
    yield "resident sessions", len(residency._sessions), world.max_resident_sessions + turns
    yield "leading prefixes", len(residency._leading), MAX_LEADING
    yield "pinned pages", load.pinned_pages, world.engine.capacity_pages
