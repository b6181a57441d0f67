"""Replicas over the real store scripts in one process and in virtual time: for tests of workers.

Everything is the production code except gRPC, sockets and the server of the store.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import anyio
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import session_pb2, types_pb2

from gateway.core import errors
from loadtest.simulation.loop import run
from loadtest.simulation.redis import LuaExecutor
from statestore.digest import RollingDigest
from statestore.ports import SessionWritten
from statestore.records import NewSession, ReplicaRef, Session, Turn
from statestore.redis_store import RedisStore
from workers.config import ReplicaSettings, TurnLimits
from workers.engines.port import PageExport, PageImport, Sampling
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.engine import SimEngine
from workers.engines.sim.model import expected_output
from workers.replica import ReplicaAdapters, run_replica
from workers.service import ReplicaApp
from workers.text.bytes_codec import BytesCodec
from workers.text.port import TextCodec
from workers.turn.ending import Broken
from workers.turn.run import TurnRun

EPOCH_US = 1_763_888_000_000_000
TENANT = "acme"
SESSION = "ses_aaaaaaaaaaaaaaaa"


class DirectChannel:
    """The KV data channel without sockets: bytes are copied in the puller's task."""

    def __init__(self) -> None:
        self.exports: dict[bytes, PageExport] = {}
        self.endpoint = "direct"
        self.corrupt_page: int | None = None
        """This page arrives with a wrong byte."""
        self.failures = 0
        """So many pulls break off."""
        self.pulls = 0
        self.latency_s = 0.001

    def issue_ticket(self, export: PageExport, lease_s: float) -> bytes:
        del lease_s
        ticket = len(self.exports).to_bytes(16, "big")
        self.exports[ticket] = export
        return ticket

    async def pull(
        self,
        endpoint: str,
        ticket: bytes,
        reservation: PageImport,
        pages: int,
        page_bytes: int,
        timeout_s: float,
    ) -> int:
        del endpoint, timeout_s
        self.pulls += 1
        export = self.exports.pop(ticket)
        try:
            await anyio.sleep(self.latency_s)
            if self.failures:
                self.failures -= 1
                raise ConnectionResetError("the stream broke")
            for index in range(pages):
                reservation.buffer(index)[:] = export.view(index)
                if index == self.corrupt_page:
                    reservation.buffer(index)[0] ^= 1
        finally:
            export.release()
        return pages * page_bytes


@dataclass
class RunningReplica:
    app: ReplicaApp
    ref: ReplicaRef
    engine: SimEngine
    stop: anyio.Event
    scope: anyio.CancelScope

    async def kill(self) -> None:
        """As SIGKILL: nothing is said to anybody."""
        self.scope.cancel()
        await anyio.sleep(0.001)

    def run(self, session_id: str = SESSION) -> TurnRun:
        """The turn that runs here, or ran last."""
        run = self.app._runs.get(session_id)
        assert run is not None
        return run

    async def break_off(self) -> None:
        """The engine gives up the turn: its run leaves it unfinished."""
        self.run().leave(Broken(errors.Unavailable("the engine makes no progress")))
        await anyio.sleep(0.1)


@dataclass
class World:
    """One store, and replicas started by name."""

    tasks: anyio.abc.TaskGroup
    executor: LuaExecutor
    store: RedisStore
    config: SimConfig
    limits: TurnLimits
    channel: DirectChannel = field(default_factory=DirectChannel)
    replicas: dict[str, RunningReplica] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)
    _nonces: int = 0

    async def start(
        self, name: str = "r1", *, codec: TextCodec | None = None, **settings: float
    ) -> RunningReplica:
        engine = SimEngine(self.config, anyio.current_time)
        adapters = ReplicaAdapters(
            store=RedisStore(self.executor, random_bytes=random.Random(name).randbytes),
            engine=engine,
            codec=codec or BytesCodec(),
            tickets=self.channel,
            peers=self,
            pull_pages=self.channel.pull,
            random=random.Random(7),
        )
        stop, scope, ready = anyio.Event(), anyio.CancelScope(), anyio.Event()

        async def serve(app: ReplicaApp, ref: ReplicaRef) -> None:
            self.replicas[name] = RunningReplica(app, ref, engine, stop, scope)
            ready.set()

        async def life() -> None:
            configured = ReplicaSettings(name, turn=self.limits, **settings)  # type: ignore[arg-type]
            with scope:
                try:
                    await run_replica(adapters, configured, f"{name}:1", serve, stop)
                except Exception as error:  # noqa: BLE001 - tests look at it
                    self.failures.append(error)

        self.tasks.start_soon(life)
        await ready.wait()
        return self.replicas[name]

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        """PeerClient: straight to the other replica."""
        del timeout_s
        return await self.replicas[endpoint.partition(":")[0]].app.export_kv(request)

    # -- what a gateway would do ----------------------------------------------------------------

    def nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(8, "big")

    async def open(
        self,
        session_id: str = SESSION,
        leading: str = "Be brief.",
        tenant: str = TENANT,
        **defaults: float,
    ) -> Session:
        """``defaults``: the session's sampling parameters."""
        salt = await self.store.tenant_salt(tenant)
        preamble = session_pb2.OpenSessionRequest(
            messages=[message(leading, types_pb2.Message.ROLE_SYSTEM)] if leading else [],
            default_params=types_pb2.SamplingParams(**defaults),  # type: ignore[arg-type]
        )
        outcome = await self.store.open_session(
            NewSession(
                session_id,
                tenant,
                "sim",
                preamble.SerializeToString(),
                RollingDigest(salt).position().digest,
                leading_digest=b"L" * 16,
            )
        )
        assert isinstance(outcome, SessionWritten)
        return outcome.session

    async def session(self, session_id: str = SESSION) -> Session:
        session = await self.store.get_session(session_id)
        assert session is not None
        return session

    async def turn(self, turn_id: str = "t1", session_id: str = SESSION) -> Turn:
        turn = await self.store.get_turn(session_id, turn_id)
        assert turn is not None
        return turn

    async def give(self, replica: RunningReplica, session_id: str = SESSION) -> Session:
        """Places or takes the session for a replica."""
        session = await self.session(session_id)
        change = self.store.place if session.owner is None else self.store.take
        outcome = await change(session_id, session.epoch, replica.ref, self.nonce())
        assert isinstance(outcome, SessionWritten), outcome
        return outcome.session

    async def start_owner(self, name: str = "r1") -> RunningReplica:
        """A replica that is given the session, which is opened for it."""
        replica = await self.start(name)
        await self.open()
        await self.give(replica)
        return replica

    async def request(
        self, replica: RunningReplica, text: str = "Hello", turn_id: str = "t1", **turn: object
    ) -> pb.DispatchTurnRequest:
        session_id = str(turn.pop("session_id", SESSION))
        session = await self.session(session_id)
        params = types_pb2.SamplingParams(**turn.pop("params", {"max_tokens": 20}))  # type: ignore[arg-type]
        return pb.DispatchTurnRequest(
            turn=types_pb2.RunTurnRequest(
                session_id=session_id,
                turn_id=turn_id,
                messages=[message(text)] if text else [],
                params=params,
                **turn,  # type: ignore[arg-type]
            ),
            epoch=types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce),
            replica=types_pb2.ReplicaRef(
                replica_id=replica.ref.replica_id, incarnation=replica.ref.incarnation
            ),
            tenant=TENANT,
        )

    async def turns(self) -> tuple[Turn, ...]:
        return await self.store.get_turns(await self.session(), 0, 9)

    async def ledger(self, session_id: str = SESSION) -> list[int]:
        session = await self.session(session_id)
        return await self.store.read_tokens(session, 0, session.head.length)


def expected(ledger: list[int], start: int, count: int) -> list[int]:
    """What the model says after the first ``start`` tokens, unless a turn asks for sampling."""
    return expected_output(ledger[:start], count, Sampling(), 0.0)


def message(
    text: str, role: types_pb2.Message.Role.ValueType = types_pb2.Message.ROLE_USER
) -> types_pb2.Message:
    return types_pb2.Message(role=role, content=text)


@dataclass
class Heard:
    """What one stream said."""

    events: list[types_pb2.TurnEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.events if e.HasField("tokens") for t in e.tokens.token_ids]

    @property
    def accepted(self) -> types_pb2.TurnAccepted:
        assert self.events[0].HasField("accepted")
        return self.events[0].accepted

    @property
    def finished(self) -> types_pb2.TurnFinished:
        assert self.events[-1].HasField("finished"), self.events[-1:]
        return self.events[-1].finished

    @property
    def text(self) -> str:
        """Checks that the offsets join without a gap."""
        text = ""
        for event in self.events:
            part = event.tokens if event.HasField("tokens") else event.finished
            if event.HasField("tokens") or event.HasField("finished"):
                assert part.text_offset == len(text)
                text += part.text
        return text

    @property
    def end(self) -> types_pb2.Position:
        """The last place this stream knows."""
        last = [e.tokens for e in self.events if e.HasField("tokens")][-1]
        return types_pb2.Position(length=last.position + len(last.token_ids), digest=last.digest)


class Standby:
    """A standby of the store that lags: it follows a turn no further than to its first tokens."""

    def __init__(self, world: World, heard: Heard) -> None:
        self._executor = world.executor
        self._heard = heard
        self._kept, self._tokens = world.executor.snapshot(), 0

    async def follow(self) -> None:
        """To be called between the parts of the turn's stream."""
        tokens = len(self._heard.tokens)
        if 3 <= tokens < 5:
            self._kept, self._tokens = self._executor.snapshot(), tokens

    def promote(self) -> None:
        """The store fails over to it: what was written after its state is lost."""
        assert 3 <= self._tokens < len(self._heard.tokens), "it loses the end of the turn"
        self._executor.restore(self._kept)


async def listen(
    replica: RunningReplica,
    request: pb.DispatchTurnRequest,
    heard: Heard | None = None,
    *,
    until: Callable[[Heard], bool] = lambda heard: False,
    between: Callable[[], Awaitable[None]] | None = None,
) -> Heard:
    """Reads a stream to its end, or until a condition holds (then it is closed)."""
    heard = Heard() if heard is None else heard
    async with aclosing(replica.app.dispatch_turn(request)) as stream:
        async for part in stream:
            heard.events.extend(part.events)
            if until(heard):
                break
            if between is not None:
                await between()
    return heard


@asynccontextmanager
async def world(
    config: SimConfig | None = None, limits: TurnLimits | None = None, delay_s: float = 0.001
) -> AsyncIterator[World]:
    started = anyio.current_time()

    def time_us() -> int:
        return EPOCH_US + round((anyio.current_time() - started) * 1_000_000)

    async def delay() -> None:
        await anyio.sleep(delay_s)

    executor = LuaExecutor(time_us, delay=delay, give_up=anyio.sleep)
    config = config or SimConfig(timing=SimTiming(step_ms=10), eos_probability=0)
    async with anyio.create_task_group() as tasks:
        built = World(
            tasks=tasks,
            executor=executor,
            store=RedisStore(executor, random_bytes=random.Random(1).randbytes),
            config=config,
            limits=limits or TurnLimits(),
        )
        yield built
        for replica in built.replicas.values():
            replica.engine.check_integrity()
        tasks.cancel_scope.cancel()


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs an async test on the virtual loop: hours cost nothing."""

    def wrapper() -> None:
        async def main() -> None:
            await test()

        run(main, seed=1)

    wrapper.__name__ = getattr(test, "__name__", "test")
    wrapper.__doc__ = test.__doc__
    return wrapper
