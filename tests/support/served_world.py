"""A gateway and replicas of the simulation, called as servers call them: by the handlers that gRPC
would run, bytes in and a status out, in virtual time and without sockets."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from google.protobuf.message import Message
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.admission import Gate
from gateway.app.gateway import GatewayApp
from gateway.rpc.auth import HeaderTenant
from gateway.rpc.services import (
    FLEET_SERVICE,
    SESSION_SERVICE,
    add_fleet_service,
    add_session_service,
)
from gateway.rpc.serving import Serving
from loadtest.simulation.world import SimReplica, World, world
from statestore.records import Session
from tests.support.wire import Answer, Wire
from workers.config import TurnLimits
from workers.rpc import SERVICE as REPLICA_SERVICE
from workers.rpc import add_replica_service

TENANT, STRANGER = "acme", "mallory"
SESSIONS: Mapping[str, type[Message]] = {
    "OpenSession": session_pb2.OpenSessionRequest,
    "GetSession": session_pb2.GetSessionRequest,
    "ListSessions": session_pb2.ListSessionsRequest,
    "RunTurn": pb.RunTurnRequest,
    "CancelTurn": session_pb2.CancelTurnRequest,
    "ForkSession": session_pb2.ForkSessionRequest,
    "SuspendSession": session_pb2.SuspendSessionRequest,
    "ResumeSession": session_pb2.ResumeSessionRequest,
    "CloseSession": session_pb2.CloseSessionRequest,
    "GetTranscript": session_pb2.GetTranscriptRequest,
    "WatchSession": session_pb2.WatchSessionRequest,
}
FLEET: Mapping[str, type[Message]] = {
    "ListReplicas": fleet_pb2.ListReplicasRequest,
    "WatchFleet": fleet_pb2.WatchFleetRequest,
    "DrainReplica": fleet_pb2.DrainReplicaRequest,
    "MigrateSession": fleet_pb2.MigrateSessionRequest,
}
REPLICA: Mapping[str, type[Message]] = {
    "DispatchTurn": replica_pb2.DispatchTurnRequest,
    "StopTurn": replica_pb2.StopTurnRequest,
    "HandOver": replica_pb2.HandOverRequest,
    "AbortHandOver": replica_pb2.AbortHandOverRequest,
    "ExportKv": replica_pb2.ExportKvRequest,
    "ImportSession": replica_pb2.ImportSessionRequest,
    "ReleaseSession": replica_pb2.ReleaseSessionRequest,
    "ReadTurns": replica_pb2.ReadTurnsRequest,
    "SetDraining": replica_pb2.SetDrainingRequest,
}
SERVICES = {SESSION_SERVICE: SESSIONS, FLEET_SERVICE: FLEET, REPLICA_SERVICE: REPLICA}
REQUESTS: Mapping[str, type[Message]] = {**SESSIONS, **FLEET, **REPLICA}
"""Method -> its request; no two services have a method of one name."""
_SERVICE_OF = {method: service for service, methods in SERVICES.items() for method in methods}


@dataclass
class Served:
    """One gateway ``g`` over replicas; the replica API is that of one replica at a time."""

    world: World
    app: GatewayApp
    gateway: Wire
    replica: Wire

    async def call(
        self,
        method: str,
        request: bytes | Message,
        tenant: str = TENANT,
        *,
        time_s: float = 30.0,
        patience_s: float = 120.0,
    ) -> Answer:
        """``time_s``: what the caller says it has left; it hangs up after ``patience_s``."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        service = _SERVICE_OF[method]
        wire = self.replica if service == REPLICA_SERVICE else self.gateway
        return await wire.call(
            f"/{service}/{method}",
            data,
            metadata=[("x-sessile-tenant", tenant)],
            time_s=time_s,
            patience_s=patience_s,
        )

    def serve_replica(self, replica: SimReplica) -> None:
        """Calls of the replica API go to this one from now on."""
        assert replica.app is not None
        self.replica = Wire()
        server: Any = self.replica
        add_replica_service(server, replica.app)

    async def open(self, request_id: str, tenant: str = TENANT, model: str = "") -> str:
        request = session_pb2.OpenSessionRequest(request_id=request_id, model=model)
        request.messages.add(role=pb.Message.ROLE_SYSTEM, content="Be brief.")
        answer = await self.call("OpenSession", request, tenant)
        answer.check()
        opened = session_pb2.OpenSessionResponse.FromString(answer.responses[0])
        return str(opened.session.session_id)

    async def turn(
        self, session_id: str, turn_id: str, tenant: str = TENANT, **params: Any
    ) -> Answer:
        return await self.call("RunTurn", turn_request(session_id, turn_id, **params), tenant)

    async def session(self, session_id: str) -> Session | None:
        return await self.world.store.get_session(session_id)

    async def owner(self, session_id: str) -> SimReplica:
        session = await self.session(session_id)
        assert session is not None
        assert session.owner is not None
        return self.world.replicas[session.owner.replica.replica_id]


def turn_request(session_id: str, turn_id: str, **params: Any) -> pb.RunTurnRequest:
    """A short turn of one message."""
    request = pb.RunTurnRequest(session_id=session_id, turn_id=turn_id)
    request.messages.add(role=pb.Message.ROLE_USER, content="Hello")
    request.params.MergeFrom(pb.SamplingParams(**{"max_tokens": 8, **params}))
    return request


def finished(answer: Answer) -> pb.TurnFinished:
    """The end of a turn's stream that ended."""
    events = pb.TurnStream.FromString(b"".join(answer.responses)).events
    assert events, answer
    return events[-1].finished


@asynccontextmanager
async def served(
    *replicas: str, seed: int = 5, drain_grace_s: float = 0.0
) -> AsyncIterator[Served]:
    """Replicas of these names, READY, and a gateway."""
    limits = TurnLimits(detach_grace_s=5, open_timeout_s=10)
    async with world(random.Random(seed), turn_limits=limits) as made:
        made.drain_grace_s = drain_grace_s
        for name in replicas:
            await made.start_replica(name)
        made.start_gateway("g")
        await anyio.sleep(1.5)
        app = made.gateways["g"].app
        wire = Wire()
        serving = Serving(HeaderTenant(), Gate("max_calls", 64, 500), Gate("max_watches", 64, 500))
        server: Any = wire
        add_session_service(server, serving, app.sessions, app.turns, app.watches)
        add_fleet_service(server, serving, app.store, app.watches, app.migrations, app.drains)
        yield Served(made, app, wire, Wire())
