"""A whole Sessile in one event loop: gateways, replicas and a store, as processes that can fail.

Everything is the production code except what :mod:`loadtest.simulation` replaces: the loop, the
server under the Lua scripts, gRPC, sockets, and the arithmetic of the model. All randomness comes
from one seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial

import anyio
from anyio.abc import TaskGroup

from gateway.app.gateway import GatewayApp
from gateway.config import GatewayConfig
from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.coverage import Row
from loadtest.simulation.engine import WatchedEngine
from loadtest.simulation.loop import Process, VirtualClock, true_time
from loadtest.simulation.network import KvPort, Listener, Network, SimReplicaClients
from loadtest.simulation.server import StoreWeather, WatchedExecutor, simulated_server
from loadtest.simulation.timeline import Timeline
from statestore.ports import StoreMisconfigured, StoreUnavailable
from statestore.records import ReplicaRef, StoreLimits
from statestore.redis_failures import check_info
from statestore.redis_store import RedisStore
from workers.config import ReplicaSettings, TurnLimits
from workers.engines.port import EngineInfo
from workers.engines.sim.config import SimConfig, SimTiming
from workers.heartbeat import ReplicaReplaced
from workers.replica import ReplicaAdapters, run_replica
from workers.service import ReplicaApp
from workers.text.bytes_codec import BytesCodec

START_US = 1_763_888_000_000_000
"""The store's clock when the simulation begins."""

ENGINE = SimConfig(
    page_size=8,
    capacity_pages=256,
    max_context_tokens=2048,
    max_running=4,
    max_queued=8,
    eos_probability=1 / 80,
    timing=SimTiming(step_ms=20, max_prefill_tokens=64),
)
"""Small and slow, so that turns last long enough for something to happen to them."""


@dataclass(frozen=True, slots=True)
class OtherWeights(SimConfig):
    """The same model after a change of its weights, as far as its KV says."""

    def info(self) -> EngineInfo:
        return replace(SimConfig.info(self), kv_fingerprint=b"other weights  .")


class OtherTokens(BytesCodec):
    """A codec of another fingerprint."""

    token_fingerprint = b"other tokenizer."


class SimIds:
    """``gateway.app.ports.Ids`` from a seed."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def nonce(self) -> bytes:
        return self._draw.randbytes(8)

    def token(self) -> str:
        return "".join(self._draw.choices("abcdefghijklmnopqrstuvwxyz234567", k=16))


@dataclass
class SimReplica:
    """One replica process. ``app`` and ``ref`` are there once it serves."""

    name: str
    process: Process
    engine: WatchedEngine
    stop: anyio.Event
    app: ReplicaApp | None = None
    ref: ReplicaRef | None = None
    endpoint: str = ""
    ended: bool = False


@dataclass
class SimGateway:
    """One gateway process."""

    name: str
    process: Process
    app: GatewayApp
    serves: bool = False
    """It has read the fleet and takes calls; or did, before it ended."""
    ended: bool = False


@dataclass
class World:
    """See the module's docstring. ``failures`` are exceptions that no API knows: bugs."""

    draw: random.Random
    tasks: TaskGroup
    network: Network
    server: WatchedExecutor
    store: RedisStore
    """Without network or faults: for checks."""
    weather: StoreWeather
    gateway_config: GatewayConfig
    turn_limits: TurnLimits
    timeline: Timeline
    engine: SimConfig = ENGINE
    max_resident_sessions: int = 4096
    drain_grace_s: float = 0.0
    """Of replicas that are told to end."""
    replicas: dict[str, SimReplica] = field(default_factory=dict)
    gateways: dict[str, SimGateway] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    engines: list[WatchedEngine] = field(default_factory=list)
    """Of all replicas there have been."""
    serving: dict[Process, SimReplica] = field(default_factory=dict)
    """All replicas that ever served, by their process."""
    other_weights: frozenset[str] = frozenset()
    """Names of replicas whose KV is of another model (P14)."""
    other_tokens: frozenset[str] = frozenset()
    """Names of replicas whose tokenizer is another."""
    tenants: dict[str, str] = field(default_factory=dict)
    """Session -> tenant, as its client opened it."""
    coverage: Counter[str] = field(default_factory=Counter)
    """See :mod:`loadtest.simulation.coverage`."""
    violations: list[str] = field(default_factory=list)
    """What engines and streams did that they must not do."""
    losing: anyio.Lock = field(default_factory=anyio.Lock)
    """Held from before the store is as it will be again, until it is."""
    _processes: list[Process] = field(default_factory=list)

    # -- replicas -----------------------------------------------------------------------------

    async def start_replica(self, name: str) -> None:
        """Starts a process of this replica id, whatever became of the last one. Returns when it
        serves, or has failed to."""
        process = self._new_process(name)

        def complain(what: str) -> None:
            self.violations.append(f"{name}: {what}")

        def refused() -> None:
            self.coverage[Row.TRANSFER_BREAKS] += 1

        config = self.engine
        if name in self.other_weights:
            config = OtherWeights(**{f.name: getattr(config, f.name) for f in fields(config)})
        engine = process.run(WatchedEngine, config, complain, refused)
        self.engines.append(engine)
        replica = SimReplica(name, process, engine, process.run(anyio.Event))
        self.replicas[name] = replica
        ready = anyio.Event()
        process.run(self.tasks.start_soon, self._replica_life, replica, ready)
        await ready.wait()

    async def _replica_life(self, replica: SimReplica, ready: anyio.Event) -> None:
        endpoint = replica.endpoint = f"{replica.name}.{len(self._processes)}:1"
        codec = OtherTokens() if replica.name in self.other_tokens else BytesCodec()
        port = KvPort(f"{endpoint}/kv", replica.process)
        self.network.data.listen(port)
        peers = SimReplicaClients(self.network)
        adapters = ReplicaAdapters(
            store=RedisStore(self.server, random_bytes=self.draw.randbytes),
            engine=replica.engine,
            codec=codec,
            tickets=port,
            peers=peers,
            pull_pages=self.network.data.pull,
            random=random.Random(self.draw.random()),
        )

        async def serve(app: ReplicaApp, ref: ReplicaRef) -> None:
            replica.app, replica.ref = app, ref
            self.serving[replica.process] = replica
            self.network.listen(Listener(endpoint, replica.process, app, handlers))
            ready.set()

        settings = ReplicaSettings(
            replica.name,
            turn=self.turn_limits,
            max_resident_sessions=self.max_resident_sessions,
            drain_grace_s=self.drain_grace_s,
        )
        try:
            self._connect(replica.name)
            async with anyio.create_task_group() as handlers:
                await run_replica(adapters, settings, endpoint, serve, replica.stop)
                handlers.cancel_scope.cancel()
        except* (ReplicaReplaced, StoreMisconfigured, StoreUnavailable):
            pass  # the process exits with a failure, and its supervisor may start another
        except* Exception as errors:  # noqa: BLE001 - the world raises them in the end
            self.failures.append(errors)
        finally:
            replica.ended = True
            self.network.hang_up(replica.process, killed=False)
            ready.set()

    # -- gateways -----------------------------------------------------------------------------

    def start_gateway(self, name: str) -> None:
        """Starts a process of this gateway."""
        process = self._new_process(name)
        app = process.run(
            partial(
                GatewayApp,
                RedisStore(self.server, random_bytes=self.draw.randbytes),
                SimReplicaClients(self.network),
                VirtualClock(),
                SimIds(random.Random(self.draw.random())),
                self.gateway_config,
            )
        )
        gateway = self.gateways[name] = SimGateway(name, process, app)
        process.run(self.tasks.start_soon, self._gateway_life, gateway)

    async def _gateway_life(self, gateway: SimGateway) -> None:
        try:
            self._connect(gateway.name)
            async with anyio.create_task_group() as handlers:
                await gateway.app.fleet.refresh()
                self.network.listen(Listener(gateway.name, gateway.process, gateway.app, handlers))
                gateway.serves = True
                await gateway.app.run()
        except* (StoreMisconfigured, StoreUnavailable):
            pass
        except* Exception as errors:  # noqa: BLE001 - as above
            self.failures.append(errors)
        finally:
            gateway.ended = True
            self.network.hang_up(gateway.process, killed=False)

    # -- faults -------------------------------------------------------------------------------

    def kill(self, node: SimReplica | SimGateway) -> None:
        """As SIGKILL: not one more instruction; the operating system resets its connections."""
        node.process.stop()
        node.ended = True
        self.network.hang_up(node.process, killed=True)

    def live_replicas(self) -> list[SimReplica]:
        """Replicas whose process runs and serves, in order of their names."""
        return [
            replica
            for _, replica in sorted(self.replicas.items())
            if not replica.ended and not replica.process.stopped and replica.app is not None
        ]

    def whose(self, process: Process) -> Ref | None:
        """The replica that a process is, as the store names it."""
        replica = self.serving.get(process)
        if replica is None or replica.ref is None:
            return None
        return replica.ref.replica_id.encode(), b"%d" % replica.ref.incarnation

    def lives(self, ref: Ref) -> bool:
        """Whether a process is this replica, and runs."""
        return any(self.whose(replica.process) == ref for replica in self.live_replicas())

    def has_died(self, ref: Ref) -> bool:
        """Whether the process that was this replica will not run again."""
        return any(
            replica.ended for process, replica in self.serving.items() if self.whose(process) == ref
        )

    def live_gateways(self) -> list[SimGateway]:
        return [g for _, g in sorted(self.gateways.items()) if not g.ended]

    # -- inside -------------------------------------------------------------------------------

    def _connect(self, name: str) -> None:
        """As whoever starts on a store does: raises what it refuses."""
        check_info(self.server.info())
        if self.weather.evicting:
            self.violations.append(f"{name}: P8: it serves on a store that may evict")

    def _new_process(self, name: str) -> Process:
        process = Process(name)
        self._processes.append(process)
        return process

    def end(self) -> None:
        """Ends every process; killed ones run their clean-up code now, without a store."""
        self.weather.down, self.weather.restarting = True, False
        self.network.heal()
        self.tasks.cancel_scope.cancel()
        for process in self._processes:
            process.resume()


@asynccontextmanager
async def world(
    draw: random.Random,
    *,
    gateway_config: GatewayConfig | None = None,
    turn_limits: TurnLimits | None = None,
    store_limits: StoreLimits | None = None,
) -> AsyncIterator[World]:
    """An empty world: no process runs yet. Raises what processes should not have raised."""
    started = true_time()
    network, weather = Network(draw), StoreWeather()

    def time_us() -> int:
        return START_US + round((true_time() - started) * 1_000_000)

    server = simulated_server(network, weather, draw, time_us)
    async with anyio.create_task_group() as tasks:
        built = World(
            draw=draw,
            tasks=tasks,
            network=network,
            server=server,
            store=RedisStore(server, limits=store_limits, random_bytes=draw.randbytes),
            weather=weather,
            gateway_config=gateway_config or GatewayConfig(),
            turn_limits=turn_limits or TurnLimits(),
            timeline=Timeline(true_time),
        )
        built.network.failures = built.failures
        try:
            yield built
        finally:
            built.end()
    if built.failures:
        raise ExceptionGroup("processes failed in ways no API knows", _flat(built.failures))


def _flat(failures: list[BaseException]) -> list[Exception]:
    return [f if isinstance(f, Exception) else RuntimeError(repr(f)) for f in failures]
