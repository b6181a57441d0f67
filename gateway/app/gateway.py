"""The whole gateway behind its two APIs, without a transport: simulations run this very class."""

from __future__ import annotations

import logging

import anyio

from gateway.app.assignment import Assigner
from gateway.app.directory import SessionDirectory
from gateway.app.drain import Drains
from gateway.app.duties import Sweeper
from gateway.app.fleet_view import FleetView
from gateway.app.leaving import Leaving
from gateway.app.migration import Migrations
from gateway.app.ports import Clock, Ids, ReplicaClients
from gateway.app.quotas import Quotas
from gateway.app.services import Services
from gateway.app.sessions import Sessions
from gateway.app.turns import Turns
from gateway.app.watch import Watches
from gateway.config import GatewayConfig
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.setup import OFF, Telemetry
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
        telemetry: Telemetry = OFF,
    ) -> None:
        self.config = config
        self.store = store
        self.fleet = FleetView(store, clock, config)
        directory = SessionDirectory(store, config)
        assigner = Assigner(store, directory, self.fleet, ids, config)
        self.quotas = Quotas(store, self.fleet, clock, config)
        self.metrics = GatewayMetrics(
            telemetry.meter("sessile.gateway"), tenant_labels=telemetry.tenant_labels
        )
        self.services = services = Services(
            store,
            directory,
            self.fleet,
            assigner,
            replicas,
            clock,
            ids,
            config,
            self.quotas,
            telemetry.tracing("sessile.gateway"),
            self.metrics,
        )
        self.sessions = Sessions(services)
        self.turns = Turns(services)
        self.metrics.count_streams(lambda: self.turns.open_streams)
        self.watches = Watches(services)
        self.migrations = Migrations(services)
        self.drains = Drains(services, self.migrations)
        self.sweeper = Sweeper(store, clock, config.gateway_id or ids.token(), config)
        self.leaving = Leaving(services, self.drains, lambda: self.sweeper.leading)

    async def run(self) -> None:
        """The gateway's own tasks, until cancelled: watching the fleet, and the sweep while it
        leads. Resigns from the sweep when cancelled."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.fleet.run, name="fleet view")
                tasks.start_soon(self.sweeper.run, name="sweeper")
                tasks.start_soon(self.leaving.run, name="leaving replicas")
                tasks.start_soon(self._report_fleet, name="fleet metrics")
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
                try:
                    await self.sweeper.resign()
                except StoreError as error:
                    log.info("the sweeper's lease ends by itself: %s", error)

    async def _report_fleet(self) -> None:
        while True:
            # No await from the look at the fleet to the wait for its next change.
            self.metrics.fleet(replica.state.lower() for replica in self.fleet.snapshot.replicas)
            await self.fleet.changed()
