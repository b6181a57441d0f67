"""What the gateway's orchestration works with, handed to each part as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.app.assignment import Assigner
from gateway.app.directory import SessionDirectory
from gateway.app.fleet_view import FleetView
from gateway.app.ports import Clock, Ids, ReplicaClients
from gateway.app.quotas import Quotas
from gateway.config import GatewayConfig
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.tracing import Tracing
from statestore.ports import SessionStore


@dataclass(frozen=True, slots=True)
class Services:
    """Made once per gateway by ``GatewayApp``; the caller of that owns store and replicas."""

    store: SessionStore
    directory: SessionDirectory
    fleet: FleetView
    assigner: Assigner
    replicas: ReplicaClients
    clock: Clock
    ids: Ids
    config: GatewayConfig
    quotas: Quotas
    tracing: Tracing = field(default_factory=lambda: Tracing("sessile.gateway"))
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
