"""The worker process: one engine behind the replica API, registered in the store."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial

import anyio
from anyio.abc import TaskStatus
from grpc import aio

from gateway.rpc.health import Health
from gateway.rpc.late import LateServices
from gateway.security.tls import Tls, endpoint_of
from gateway.telemetry.setup import OFF, Telemetry, installed
from statestore.journal import RedisJournal
from statestore.process import PRINTED, Announce, or_stopped, run_process
from statestore.records import ReplicaRef
from statestore.redis_executor import connect_when_there
from workers.config import WorkerConfig, join_address, split_address
from workers.engines.port import EngineFailed
from workers.engines.registry import Backend, create_backend
from workers.heartbeat import ReplicaReplaced
from workers.kv.channel import KvServer, pull_pages
from workers.public_prefixes import declare, load_prefixes
from workers.replica import ReplicaAdapters, run_replica
from workers.rpc import SERVICE, GrpcPeers, add_replica_service, new_server
from workers.service import ReplicaApp

log = logging.getLogger(__name__)


async def serve(
    config: WorkerConfig,
    *,
    stop: anyio.Event,
    backend: Backend | None = None,
    telemetry: Telemetry = OFF,
    task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until ``stop`` is set (also by the end of a drain); reports host:port once it does.
    While it waits for the store its health is NOT_SERVING. ``backend`` takes the place of the
    engine that ``config`` names.

    Raises ValueError or ImportError for an engine that cannot be made, OSError if an address
    cannot be bound, StoreError if the store cannot be used, EngineFailed, ReplicaReplaced.
    """
    backend = backend or create_backend(
        config.engine, dict(config.engine_options), anyio.current_time
    )
    if config.public_prefixes is not None:
        prefixes = load_prefixes(config.public_prefixes)
        pages = declare(prefixes, backend.engine.info, backend.codec)
        log.info("all tenants share the %d KV pages of public prefixes", pages)
    async with AsyncExitStack() as stack:
        security = config.security
        tls = Tls(security.tls) if security.tls is not None else None
        peers = GrpcPeers(tls, allow_insecure=security.allow_insecure)
        stack.push_async_callback(peers.aclose)
        host, port = split_address("listen", config.listen)
        kv_host, kv_port = split_address("kv_listen", config.kv_listen)
        channel = KvServer(kv_host, kv_port, advertised_host=config.advertise_host, tls=tls)
        stack.callback(channel.close)
        server, port = new_server(host, port, tls)
        endpoint = endpoint_of(join_address(config.advertise_host or host, port), tls)
        health = Health(SERVICE)
        await health.add_to(server)
        services = LateServices("this replica waits for its store")
        server.add_generic_rpc_handlers((services,))
        await server.start()
        stack.push_async_callback(_stop_now, server)
        executor = await or_stopped(
            stop, partial(connect_when_there, config.redis_url, config.redis)
        )
        if executor is None:
            return
        store = RedisJournal(executor)
        stack.push_async_callback(_shielded, store)
        adapters = ReplicaAdapters(
            store=store,
            engine=backend.engine,
            codec=backend.codec,
            tickets=channel,
            peers=peers,
            pull_pages=partial(pull_pages, tls=tls, allow_insecure=security.allow_insecure),
            random=random.SystemRandom(),
            telemetry=telemetry,
        )

        async def reachable(app: ReplicaApp, ref: ReplicaRef) -> None:
            add_replica_service(services, app)
            services.open()
            await health.tell(ready=True)

            def ready() -> bool:
                # While the store is away nothing can begin; turns that run here wait for it.
                return app.store_answers and not stop.is_set()

            tasks.start_soon(health.follow, ready, config.replica.heartbeat_period_s)
            log.info("%s serves %s on %s", ref, backend.engine.info.model, endpoint)
            task_status.started(endpoint)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.serve)
            try:
                await run_replica(adapters, config.replica, endpoint, reachable, stop)
                await health.tell(ready=False)
                await server.stop(config.shutdown_grace_s)
            finally:
                await _stop_now(server)
            tasks.cancel_scope.cancel()


async def _stop_now(server: aio.Server) -> None:
    with anyio.CancelScope(shield=True):
        await server.stop(None)


async def _shielded(store: RedisJournal) -> None:
    with anyio.CancelScope(shield=True):
        await store.aclose()


def run(config: WorkerConfig, announce: Announce = PRINTED) -> None:
    """Runs a worker process until SIGTERM, SIGINT or the end of a drain; a second signal ends it at
    once. Exits with 1 if the engine fails or another process takes the replica's id."""
    try:
        with _telemetry(config) as telemetry:
            run_process(partial(serve, config, telemetry=telemetry), announce)
    except* (EngineFailed, ReplicaReplaced) as group:
        for error in _leaves(group):
            log.critical("the worker must stop: %s", error)
        raise SystemExit(1) from group


def _telemetry(config: WorkerConfig) -> AbstractContextManager[Telemetry]:
    replica = config.replica
    says = {"sessile.engine": config.engine, "sessile.site": replica.site}
    says = {name: value for name, value in says.items() if value}
    tls = config.security.tls
    metrics_tls = None if tls is None else Tls(tls).metrics
    return installed(config.telemetry, "sessile-worker", replica.replica_id, says, tls=metrics_tls)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
