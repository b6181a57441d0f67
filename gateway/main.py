"""The gateway process: wires the application to Redis and gRPC, runs it, stops it in order."""

from __future__ import annotations

import base64
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, cast

import anyio
from anyio.abc import TaskStatus
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from gateway.app.admission import Gate
from gateway.app.gateway import GatewayApp
from gateway.config import GatewayConfig
from gateway.core.machines import ReplicaState
from gateway.rpc.auth import Authenticator, authenticator_of
from gateway.rpc.health import Health
from gateway.rpc.late import LateServices
from gateway.rpc.replica_client import GrpcReplicaClients
from gateway.rpc.requests import OpenServices
from gateway.rpc.services import (
    FLEET_SERVICE,
    SESSION_SERVICE,
    add_fleet_service,
    add_session_service,
)
from gateway.rpc.serving import Serving
from gateway.security.audit import AuditLog
from gateway.security.tls import Tls
from gateway.telemetry.setup import OFF, Telemetry, installed
from statestore.embedded import embedded_server
from statestore.ports import StoreMisconfigured
from statestore.process import PRINTED, Announce, or_stopped, run_process
from statestore.redis_executor import connect_when_there
from statestore.redis_store import RedisStore
from statestore.script_runner import RetryPolicy

log = logging.getLogger(__name__)

STORE_RETRY = RetryPolicy(total_timeout_s=2.0)
"""Shorter than the store's default: a stream that waits tells its client so."""


class LoopClock:
    """The event loop's monotonic clock."""

    def now(self) -> float:
        return anyio.current_time()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class SystemIds:
    """Randomness from the operating system."""

    def nonce(self) -> bytes:
        return secrets.token_bytes(8)

    def token(self) -> str:
        return base64.b32encode(secrets.token_bytes(10)).decode().lower()


@asynccontextmanager
async def open_store(config: GatewayConfig) -> AsyncIterator[RedisStore]:
    """The store at a URL, which is waited for, or a private embedded server without one (it ends
    with this process and its workers need its URL: for one machine)."""
    async with AsyncExitStack() as stack:
        url = config.redis_url
        if not url:
            url = await stack.enter_async_context(embedded_server(config.data_directory))
            log.info("the private store is at %s", url)
        try:
            executor = await connect_when_there(url, config.redis)
            store = RedisStore(executor, limits=config.store, retry=STORE_RETRY)
        except ValueError as error:
            raise StoreMisconfigured(str(error)) from error
        try:
            yield store
        finally:
            with anyio.CancelScope(shield=True):
                await store.aclose()


async def serve(
    config: GatewayConfig,
    *,
    stop: anyio.Event,
    authenticator: Authenticator | None = None,
    telemetry: Telemetry = OFF,
    task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until ``stop`` is set, then lets streams end within the grace. Listens at once, but
    until the store is there its health is NOT_SERVING and calls are UNAVAILABLE; reports host:port
    as soon as it serves. Raises StoreError if the store cannot be used at start, OSError if the
    address cannot be bound, OSError or ValueError for keys and certificates that cannot be used."""
    async with AsyncExitStack() as stack:
        authenticator = authenticator or authenticator_of(config.security)
        services = LateServices("this gateway waits for its store")
        server, port = _server(config)
        health = Health(SESSION_SERVICE, FLEET_SERVICE)
        await _add_open_services(server, config, health)
        server.add_generic_rpc_handlers((services,))
        await server.start()
        stack.push_async_callback(_stop_now, server)
        opening = partial(stack.enter_async_context, open_store(config))
        store = await or_stopped(stop, opening)
        if store is None:
            return
        replicas = GrpcReplicaClients(config)
        stack.push_async_callback(replicas.aclose)
        app = GatewayApp(store, replicas, LoopClock(), SystemIds(), config, telemetry)
        await app.fleet.refresh()
        serving = _serving(config, app, authenticator)
        add_session_service(services, serving, app.sessions, app.turns, app.watches)
        add_fleet_service(services, serving, app.store, app.watches, app.migrations, app.drains)

        def ready() -> bool:
            # Another gateway may still reach the store; turns that run here go on waiting for it.
            return app.fleet.store_answers and not stop.is_set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app.run, name="gateway")
            tasks.start_soon(serving.run, name="credentials of open streams")
            tasks.start_soon(_keep_warm, app, replicas, name="channels")
            services.open()
            try:
                await health.tell(ready=True)
                tasks.start_soon(health.follow, ready, config.times.fleet_poll_s, name="readiness")
                address = f"{config.listen.rpartition(':')[0]}:{port}"
                log.info("gateway listens on %s", address)
                task_status.started(address)
                await stop.wait()
                await health.tell(ready=False)
                await server.stop(config.times.shutdown_grace_s)
            finally:
                await _stop_now(server)
            tasks.cancel_scope.cancel()


async def _stop_now(server: aio.Server) -> None:
    with anyio.CancelScope(shield=True):
        await server.stop(None)


def run(config: GatewayConfig, announce: Announce = PRINTED) -> None:
    """Runs a gateway process until SIGTERM or SIGINT; a second signal ends it at once. Raises what
    :func:`gateway.telemetry.setup.installed` does for telemetry that cannot be, OSError or
    ValueError for certificates that cannot be used."""
    tls = config.security.tls
    metrics_tls = None if tls is None else Tls(tls).metrics
    with installed(
        config.telemetry, "sessile-gateway", config.gateway_id, {}, tls=metrics_tls
    ) as telemetry:
        run_process(partial(serve, config, telemetry=telemetry), announce)


def _server(config: GatewayConfig) -> tuple[aio.Server, int]:
    """A server bound to the address but not started; and its port."""
    admission = config.admission
    server = aio.server(
        maximum_concurrent_rpcs=admission.max_rpcs,
        options=[
            ("grpc.max_send_message_length", admission.max_message_bytes),
            ("grpc.max_receive_message_length", admission.max_request_bytes),
            ("grpc.max_allowed_incoming_connections", admission.max_connections),
            ("grpc.max_concurrent_streams", admission.max_rpcs),
            ("grpc.server_handshake_timeout_ms", int(config.times.handshake_s * 1000)),
            ("grpc.max_connection_idle_ms", int(config.times.idle_connection_s * 1000)),
            ("grpc.so_reuseport", 0),
            # Clients ping while they wait; oftener than this is abuse, and ends their connection.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            *config.times.keepalive_options(),
        ],
    )
    try:
        if config.security.tls is None:
            return server, server.add_insecure_port(config.listen)
        tls = config.security.tls
        credentials = Tls(tls).server_credentials(
            require_client_certificate=tls.require_client_certificate
        )
        return server, server.add_secure_port(config.listen, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {config.listen}: {error}") from error


async def _add_open_services(server: aio.Server, config: GatewayConfig, health: Health) -> None:
    """What needs no credentials."""
    admission = config.admission
    gate = Gate(
        "max_open_calls",
        admission.max_open_calls,
        admission.retry_after_ms,
        admission.share_per_tenant,
    )
    bounded = OpenServices(server, gate, config.times.request_s)
    await health.add_to(bounded)
    if config.reflection:
        names = (SESSION_SERVICE, FLEET_SERVICE, reflection.SERVICE_NAME)
        servicer = reflection.aio.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, cast(Any, bounded))


def _serving(config: GatewayConfig, app: GatewayApp, authenticator: Authenticator) -> Serving:
    admission = config.admission
    audit = AuditLog(config.security.audit_log)
    audit.check()
    shared = (admission.retry_after_ms, admission.share_per_tenant)
    return Serving(
        authenticator,
        calls=Gate("max_calls", admission.max_calls, *shared),
        watches=Gate("max_watches", admission.max_watches, *shared),
        metrics=app.metrics,
        audit=audit,
        requests=Gate("max_rpcs", admission.max_rpcs, *shared),
        request_s=config.times.request_s,
    )


async def _keep_warm(app: GatewayApp, replicas: GrpcReplicaClients) -> None:
    """Connects to every replica that is up: the first dispatch to it may be a fail-over."""
    while True:
        # No await from the look at the fleet to the wait for its next change.
        for replica in app.fleet.snapshot.replicas:
            if replica.state is not ReplicaState.DOWN and not replica.stale:
                replicas.warm(replica.details.endpoint, replica.ref.incarnation)
        await app.fleet.changed()
