"""One replica's life: start the engine, register, serve, beat; stop in order.

Independent of gRPC and sockets, so that the simulation runs the same code. Cancelling
:func:`run_replica` is a crash: nothing is said to the store, as if the process had been killed. An
orderly stop goes through the ``stop`` event.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import anyio

from gateway.telemetry.metrics import WorkerMetrics
from gateway.telemetry.setup import OFF, Telemetry
from statestore.ports import JournalPort, StoreUnavailable
from statestore.records import ReplicaRef, ReplicaRegistration
from statestore.replica_info import ReplicaDetails
from workers.config import ReplicaSettings
from workers.engines.port import Engine, EngineFailed
from workers.heartbeat import ReplicaReplaced, heartbeat
from workers.journal import Journal, until_answered
from workers.kv.transfer import KvTransfer, PeerClient, Puller, TicketIssuer
from workers.prefetch import Prefetches
from workers.residency import Residency
from workers.service import ReplicaApp, pull_by_plan
from workers.text.port import TextCodec
from workers.turn.dispatcher import Dispatcher
from workers.turn.ports import Salts, TurnPorts

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 60.0
GOODBYE_TIMEOUT_S = 2.0
SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class ReplicaAdapters:
    """The world as a replica sees it. The caller owns and closes them, except the engine."""

    store: JournalPort
    engine: Engine
    codec: TextCodec
    tickets: TicketIssuer
    peers: PeerClient
    pull_pages: Puller
    random: random.Random
    telemetry: Telemetry = OFF


async def run_replica(
    adapters: ReplicaAdapters,
    settings: ReplicaSettings,
    endpoint: str,
    serve: Callable[[ReplicaApp, ReplicaRef], Awaitable[None]],
    stop: anyio.Event,
) -> None:
    """Runs until ``stop`` is set, and then at most ``drain_grace_s`` longer, until its sessions are
    elsewhere. ``endpoint`` (host:port) is announced to the fleet; ``serve``
    must make the app reachable there and return.

    Raises EngineFailed if the engine fails, ReplicaReplaced if another process took the id; the
    process should then exit with a failure.
    """
    failures: list[EngineFailed | ReplicaReplaced] = []
    failed = anyio.Event()

    def fail(error: EngineFailed | ReplicaReplaced) -> None:
        failures.append(error)
        failed.set()
        stop.set()

    async def beat(ref: ReplicaRef, app: ReplicaApp) -> None:
        try:
            await heartbeat(store, ref, app, settings.heartbeat_period_s)
        except ReplicaReplaced as error:
            fail(error)

    dispatcher = Dispatcher()
    engine, store = adapters.engine, adapters.store
    try:
        await engine.start(dispatcher.on_step, fail)
        registration = ReplicaRegistration(
            settings.replica_id, _details(adapters, settings, endpoint).to_json()
        )
        ref = await until_answered(
            partial(store.register_replica, registration),
            anyio.current_time() + REGISTER_TIMEOUT_S,
        )
        metrics = WorkerMetrics(
            adapters.telemetry.meter("sessile.worker"),
            model=engine.info.model,
            tenant_labels=adapters.telemetry.tenant_labels,
        )
        journal = Journal(store, lanes=settings.journal_lanes, metrics=metrics)
        ports, transfer = _ports(adapters, settings, ref, dispatcher, journal, metrics)
        async with anyio.create_task_group() as tasks:
            await tasks.start(journal.run)
            prefetches = Prefetches(ports, settings.pull_timeout_s)
            app = ReplicaApp(ports, transfer, prefetches, tasks, on_empty=stop.set)
            try:
                await serve(app, ref)
                tasks.start_soon(beat, ref, app)
                tasks.start_soon(app.reconcile)
                await stop.wait()
                if settings.drain_grace_s and not failures:
                    await _leave(app, settings.drain_grace_s, failed)
            finally:
                app.close()
            tasks.cancel_scope.cancel()
        await _say_goodbye(store, ref)
    finally:
        with anyio.CancelScope(shield=True):
            await engine.aclose()
    if failures:
        raise failures[0]


def _ports(
    adapters: ReplicaAdapters,
    settings: ReplicaSettings,
    ref: ReplicaRef,
    dispatcher: Dispatcher,
    journal: Journal,
    metrics: WorkerMetrics,
) -> tuple[TurnPorts, KvTransfer]:
    tracing = adapters.telemetry.tracing("sessile.worker")
    residency = Residency(
        adapters.engine,
        ref,
        max_sessions=settings.max_resident_sessions,
        max_tokens=settings.max_resident_tokens,
        pin_ttl_s=settings.pin_ttl_s,
    )
    transfer = KvTransfer(
        ref,
        adapters.engine,
        adapters.tickets,
        adapters.peers,
        adapters.pull_pages,
        pull_timeout_s=settings.pull_timeout_s,
        tracing=tracing,
        metrics=metrics,
    )
    ports = TurnPorts(
        ref=ref,
        store=adapters.store,
        journal=journal,
        engine=adapters.engine,
        codec=adapters.codec,
        dispatcher=dispatcher,
        residency=residency,
        salts=Salts(adapters.store),
        pull_prefix=partial(pull_by_plan, transfer, settings.pin_ttl_s),
        draw_seed=partial(adapters.random.getrandbits, SEED_BITS),
        limits=settings.turn,
        tracing=tracing,
        metrics=metrics,
    )
    return ports, transfer


def _details(adapters: ReplicaAdapters, settings: ReplicaSettings, endpoint: str) -> ReplicaDetails:
    info = adapters.engine.info
    return ReplicaDetails(
        endpoint=endpoint,
        model=info.model,
        engine=info.engine,
        token_fingerprint=adapters.codec.token_fingerprint.hex(),
        kv_fingerprint=info.kv_fingerprint.hex(),
        page_size=info.page_size,
        capacity_pages=info.capacity_pages,
        max_context_tokens=info.max_context_tokens,
        max_running_turns=info.max_running,
        max_queued_turns=info.max_queued,
        batch_share=settings.turn.batch_share,
        site=settings.site,
        hardware=settings.hardware,
    )


async def _leave(app: ReplicaApp, grace_s: float, failed: anyio.Event) -> None:
    """Until no session is left here, the grace is over, or there is nothing to be saved."""
    log.info("asking for its %d sessions to be moved elsewhere", len(app.session_ids()))
    emptied = False
    with anyio.move_on_after(grace_s):
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await failed.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(give_up)
            emptied = await app.leave()
            tasks.cancel_scope.cancel()
    if not emptied and (left := len(app.session_ids())):
        log.warning("ends with %d sessions; they go on elsewhere when they are next used", left)


async def _say_goodbye(store: JournalPort, ref: ReplicaRef) -> None:
    """Saves observers the wait for the lease; without an answer they wait it out."""
    with anyio.move_on_after(GOODBYE_TIMEOUT_S):
        try:
            await store.deregister_replica(ref)
        except StoreUnavailable as error:
            log.warning("%s could not say good-bye: %s", ref, error)
