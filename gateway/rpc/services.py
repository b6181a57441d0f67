"""The services a gateway serves, as tables from method to application call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import grpc
from grpc import aio
from sessile.v1 import fleet_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.directory import unknown_session
from gateway.app.drain import Drains
from gateway.app.migration import Migrations, MoveOptions
from gateway.app.sessions import Sessions
from gateway.app.tracing import traced
from gateway.app.turns import Turns
from gateway.app.watch import Watches
from gateway.core.errors import InvalidRequest
from gateway.rpc.late import LateServices
from gateway.rpc.serving import Serving
from statestore.ports import SessionStore

SESSION_SERVICE = "sessile.v1.SessionService"
FLEET_SERVICE = "sessile.v1.FleetService"

MAX_MOVE_S = 3600.0
MAX_DRAIN_S = 86_400.0
MAX_WATCH_INTERVAL_S = 60.0


def add_session_service(
    server: aio.Server | LateServices,
    serving: Serving,
    sessions: Sessions,
    turns: Turns,
    watches: Watches,
) -> None:
    """The agent API. RunTurn passes serialised messages through."""

    def watch(
        tenant: str, request: session_pb2.WatchSessionRequest
    ) -> AsyncGenerator[session_pb2.WatchSessionResponse, None]:
        return watches.session(tenant, request.session_id)

    named = partial(traced, sessions.services)
    methods: dict[str, Any] = {
        "OpenSession": serving.unary(sessions.open, session_pb2.OpenSessionRequest),
        "GetSession": serving.unary(sessions.get, session_pb2.GetSessionRequest),
        "ListSessions": serving.unary(sessions.list, session_pb2.ListSessionsRequest),
        "RunTurn": serving.relayed(turns.run, pb.RunTurnRequest),
        "CancelTurn": serving.unary(
            named("cancel", sessions.cancel_turn), session_pb2.CancelTurnRequest
        ),
        "ForkSession": serving.unary(named("fork", sessions.fork), session_pb2.ForkSessionRequest),
        "SuspendSession": serving.unary(
            named("suspend", sessions.suspend), session_pb2.SuspendSessionRequest
        ),
        "ResumeSession": serving.unary(
            named("resume", sessions.resume), session_pb2.ResumeSessionRequest
        ),
        "CloseSession": serving.unary(
            named("close", sessions.close), session_pb2.CloseSessionRequest
        ),
        "GetTranscript": serving.unary(sessions.transcript, session_pb2.GetTranscriptRequest),
        "WatchSession": serving.streaming(watch, session_pb2.WatchSessionRequest),
    }
    _add(server, SESSION_SERVICE, methods)


def add_fleet_service(
    server: aio.Server | LateServices,
    serving: Serving,
    store: SessionStore,
    watches: Watches,
    migrations: Migrations,
    drains: Drains,
) -> None:
    """The operator API. Operators are not confined to a tenant."""

    async def list_replicas(
        _: str, request: fleet_pb2.ListReplicasRequest
    ) -> fleet_pb2.ListReplicasResponse:
        return fleet_pb2.ListReplicasResponse(replicas=watches.replicas(request.include_down))

    def watch_fleet(
        _: str, request: fleet_pb2.WatchFleetRequest
    ) -> AsyncGenerator[fleet_pb2.WatchFleetResponse, None]:
        _check_ms("interval_ms", request.interval_ms, MAX_WATCH_INTERVAL_S)
        return watches.fleet(request.interval_ms)

    def drain(
        _: str, request: fleet_pb2.DrainReplicaRequest
    ) -> AsyncGenerator[fleet_pb2.DrainReplicaResponse, None]:
        _check_ms("timeout_ms", request.timeout_ms, MAX_DRAIN_S)
        if request.undo:
            if request.shutdown:
                raise InvalidRequest("undo and shutdown contradict each other: give one of them")
            return drains.undo(request.replica_id)
        return drains.drain(request.replica_id, request.timeout_ms / 1000, request.shutdown)

    async def migrate(
        _: str, request: fleet_pb2.MigrateSessionRequest
    ) -> fleet_pb2.MigrateSessionResponse:
        _check_ms("timeout_ms", request.timeout_ms, MAX_MOVE_S)
        session = await store.get_session(request.session_id)
        if session is None:
            raise unknown_session(request.session_id)
        options = MoveOptions(
            request.target_replica_id, request.timeout_ms / 1000, request.allow_recompute
        )
        return fleet_pb2.MigrateSessionResponse(result=await migrations.migrate(session, options))

    methods: dict[str, Any] = {
        "ListReplicas": serving.unary(list_replicas, fleet_pb2.ListReplicasRequest),
        "WatchFleet": serving.streaming(watch_fleet, fleet_pb2.WatchFleetRequest),
        "DrainReplica": serving.streaming(drain, fleet_pb2.DrainReplicaRequest),
        "MigrateSession": serving.unary(migrate, fleet_pb2.MigrateSessionRequest),
    }
    _add(server, FLEET_SERVICE, methods)


def _check_ms(name: str, value_ms: int, limit_s: float) -> None:
    if value_ms > limit_s * 1000:
        raise InvalidRequest(f"{name} is at most {int(limit_s * 1000)}")


def _add(server: aio.Server | LateServices, service: str, methods: dict[str, Any]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
