"""The whole gateway behind its two APIs, without a transport: simulations run this very class."""

from __future__ import annotations

import logging

import anyio

from gateway.app.assignment import Assigner
from gateway.app.directory import SessionDirectory
from gateway.app.drain import Drains
from gateway.app.duties import Sweeper
from gateway.app.fleet_view import FleetView
from gateway.app.migration import Migrations
from gateway.app.ports import Clock, Ids, ReplicaClients
from gateway.app.services import Services
from gateway.app.sessions import Sessions
from gateway.app.turns import Turns
from gateway.app.watch import Watches
from gateway.config import GatewayConfig
from statestore.ports import SessionStore, StoreError

log = logging.getLogger(__name__)


class GatewayApp:
    """Everything of one gateway process that is not wire. The caller owns store and replicas."""

    def __init__(
        self,
        store: SessionStore,
        replicas: ReplicaClients,
        clock: Clock,
        ids: Ids,
        config: GatewayConfig,
    ) -> None:
        self.config = config
        self.store = store
        self.fleet = FleetView(store, clock, config)
        directory = SessionDirectory(store, config)
        assigner = Assigner(store, directory, self.fleet, ids, config)
        services = Services(store, directory, self.fleet, assigner, replicas, clock, ids, config)
        self.sessions = Sessions(services)
        self.turns = Turns(services)
        self.watches = Watches(services)
        self.migrations = Migrations(services)
        self.drains = Drains(services, self.migrations)
        self.sweeper = Sweeper(store, clock, config.gateway_id or ids.token(), config)

    async def run(self) -> None:
        """The gateway's own tasks, until cancelled: watching the fleet, and the sweep while it
        leads. Resigns from the sweep when cancelled."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.fleet.run, name="fleet view")
                tasks.start_soon(self.sweeper.run, name="sweeper")
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
                try:
                    await self.sweeper.resign()
                except StoreError as error:
                    log.info("the sweeper's lease ends by itself: %s", error)
