"""A gateway in virtual time: the production application over the real store scripts and fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from sessile.v1 import session_pb2, types_pb2

from gateway.app.gateway import GatewayApp
from gateway.config import GatewayConfig
from gateway.core.errors import SessileError
from loadtest.simulation.loop import VirtualClock, run
from loadtest.simulation.redis import LuaExecutor
from statestore.digest import RollingDigest
from statestore.records import Session
from statestore.redis_store import RedisStore
from tests.support.fake_replica import (
    INPUT_TOKENS,
    FakeFleet,
    FakeReplica,
    SeededIds,
    next_token,
    until,
)
from tests.support.fleets import MODEL

EPOCH_US = 1_763_888_000_000_000
TENANT = "acme"


@dataclass
class Client:
    """One RunTurn call: what it received, and how it ended."""

    messages: list[bytes] = field(default_factory=list)
    error: SessileError | None = None
    done: bool = False
    pause_s: float = 0.0
    """Each message takes this long to be sent: a slow reader."""

    async def sink(self, message: bytes) -> None:
        self.messages.append(message)
        await anyio.sleep(self.pause_s)

    @property
    def events(self) -> list[types_pb2.TurnEvent]:
        return list(types_pb2.TurnStream.FromString(b"".join(self.messages)).events)

    @property
    def kinds(self) -> list[str]:
        """Kinds of events, runs of tokens as one."""
        kinds = [event.WhichOneof("event") or "?" for event in self.events]
        return [k for i, k in enumerate(kinds) if i == 0 or k != "tokens" or kinds[i - 1] != k]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """(position, token id) of everything received."""
        return [
            (event.tokens.position + i, token)
            for event in self.events
            for i, token in enumerate(event.tokens.token_ids)
        ]

    def only(self, kind: str) -> list[types_pb2.TurnEvent]:
        return [event for event in self.events if event.WhichOneof("event") == kind]

    @property
    def finished(self) -> types_pb2.TurnFinished:
        return self.events[-1].finished


@dataclass
class World:
    """A store, fakes, and gateways."""

    executor: LuaExecutor
    store: RedisStore
    fleet: FakeFleet
    gateways: list[GatewayApp]
    tasks: anyio.abc.TaskGroup

    @property
    def gateway(self) -> GatewayApp:
        return self.gateways[0]

    async def replica(self, name: str, **options: object) -> FakeReplica:
        """Starts a replica and waits until every gateway takes it for READY."""
        replica = await self.fleet.start(name, **options)  # type: ignore[arg-type]
        await anyio.sleep(1.5)
        return replica

    async def open(self, request_id: str = "r1", tenant: str = TENANT) -> str:
        request = session_pb2.OpenSessionRequest(request_id=request_id, model=MODEL)
        request.messages.add(role=types_pb2.Message.ROLE_SYSTEM, content="Be brief.")
        answer = await self.gateway.sessions.open(tenant, request)
        return answer.session.session_id

    def turn(
        self,
        session_id: str,
        turn_id: str = "t1",
        *,
        gateway: int = 0,
        tenant: str = TENANT,
        time_left_s: float | None = 60.0,
        pause_s: float = 0.0,
        **fields: object,
    ) -> Client:
        """Starts RunTurn in the background."""
        client = Client(pause_s=pause_s)
        request = types_pb2.RunTurnRequest(
            session_id=session_id,
            turn_id=turn_id,
            **fields,  # type: ignore[arg-type]
        )

        async def call() -> None:
            try:
                await self.gateways[gateway].turns.run(tenant, request, time_left_s, client.sink)
            except SessileError as error:
                client.error = error
            client.done = True

        self.tasks.start_soon(call)
        return client

    async def finish(self, client: Client) -> Client:
        """Waits for a call's end."""
        with anyio.fail_after(300):
            await until(lambda: client.done)
        return client

    async def session(self, session_id: str) -> Session:
        session = await self.store.get_session(session_id)
        assert session is not None
        return session

    async def kill_owner(self, session_id: str) -> FakeReplica:
        owner = (await self.session(session_id)).owner
        assert owner is not None
        replica = self.fleet.replicas[owner.replica.replica_id]
        replica.dead = True
        return replica

    def calls_to_store(self, *names: str) -> list[str]:
        """The names of these calls, in order, as gateways make them from now on."""
        made: list[str] = []
        for name in names:
            call = getattr(self.store, name)

            def counted(*args: Any, name: str = name, call: Any = call) -> Any:
                made.append(name)
                return call(*args)

            setattr(self.store, name, counted)
        return made

    async def check_gapless(self, client: Client, session_id: str, turn_id: str = "t1") -> None:
        """What the client has is exactly the ledger's output of the turn, and the ledger is what
        one uninterrupted run would have written."""
        session = await self.session(session_id)
        turn = await self.store.get_turn(session_id, turn_id)
        assert turn is not None
        ledger = await self.store.read_tokens(session, 0, session.head.length)
        start, end = turn.output_start.length, turn.output_end.length
        assert client.tokens == [(p, ledger[p]) for p in range(start, end)]
        salt = await self.store.tenant_salt(session.tenant)
        assert ledger[start:end] == uninterrupted(salt, ledger[:start], end - start)


def uninterrupted(salt: bytes, context: list[int], count: int) -> list[int]:
    """What the fakes' model says after this context."""
    digest, tokens = RollingDigest.of(salt, context), []
    for _ in range(count):
        tokens.append(next_token(digest.position()))
        digest.update(tokens[-1:])
    return tokens


@asynccontextmanager
async def world(
    gateways: int = 1, config: GatewayConfig | None = None, **replicas: int
) -> AsyncIterator[World]:
    """``replicas``: name -> output tokens of its turns."""
    clock = VirtualClock()
    executor = LuaExecutor(lambda: EPOCH_US + int(clock.now() * 1e6))
    store = RedisStore(executor)
    async with anyio.create_task_group() as tasks:
        fleet = FakeFleet(store, tasks)
        apps = [
            GatewayApp(store, fleet, clock, SeededIds(i), config or GatewayConfig())
            for i in range(gateways)
        ]
        for app in apps:
            tasks.start_soon(app.run)
        made = World(executor, store, fleet, apps, tasks)
        for name, output_tokens in replicas.items():
            await fleet.start(name, output_tokens=output_tokens)
        if replicas:
            await anyio.sleep(1.5)
        yield made
        tasks.cancel_scope.cancel()


def simulated(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs an async test in virtual time."""

    def run_test() -> None:
        async def main() -> None:
            await test()

        run(main)

    run_test.__name__ = test.__name__
    run_test.__doc__ = test.__doc__
    return run_test


__all__ = ["INPUT_TOKENS", "MODEL", "TENANT", "Client", "World", "simulated", "world"]
