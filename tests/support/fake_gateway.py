"""A gateway for tests of the client: a real gRPC server that plays a script and takes notes."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio
from sessile.v1 import fleet_pb2, fleet_pb2_grpc, session_pb2, session_pb2_grpc
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import SessileError
from gateway.rpc.status import abort

OUTPUT_START = 10
"""Where the output of the scripted turn starts."""


@dataclass(frozen=True)
class Fail:
    """End the call with one of the server's errors."""

    error: SessileError


@dataclass(frozen=True)
class Cut:
    """End the call with a bare status, as a transport or proxy does."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True)
class Hang:
    """Nothing more, until the client goes or the turn is cancelled."""


Step = pb.TurnEvent | Fail | Cut | Hang


def digest(length: int) -> bytes:
    return hashlib.blake2b(str(length).encode(), digest_size=16).digest()


def place(length: int) -> pb.Position:
    return pb.Position(length=length, digest=digest(length))


def accepted(replica: str = "r1", attempt: int = 1, **fields: Any) -> pb.TurnEvent:
    fields = {"output_start": place(OUTPUT_START), "turn_id": "t1", **fields}
    ref = pb.ReplicaRef(replica_id=replica, incarnation=1)
    return pb.TurnEvent(accepted=pb.TurnAccepted(replica=ref, attempt=attempt, **fields))


def tokens(first: int, count: int = 2) -> pb.TurnEvent:
    """Output tokens ``first`` and on; token i is 100 + i and its text two letters."""
    indices = range(first, first + count)
    return pb.TurnEvent(
        tokens=pb.TurnTokens(
            position=OUTPUT_START + first,
            token_ids=[100 + i for i in indices],
            digest=digest(OUTPUT_START + first + count),
            text="".join(word(i) for i in indices),
            text_offset=2 * first,
        )
    )


def word(index: int) -> str:
    return f"{chr(ord('a') + index % 26)} "


def finished(
    count: int, status: pb.TurnStatus.ValueType = pb.TURN_STATUS_COMMITTED, **fields: Any
) -> pb.TurnEvent:
    fields = {"reason": pb.FINISH_REASON_STOP, **fields}
    return pb.TurnEvent(
        finished=pb.TurnFinished(
            status=status,
            end=place(OUTPUT_START + count),
            text_end=2 * count,
            usage=pb.Usage(input_tokens=OUTPUT_START, cached_tokens=4, output_tokens=count),
            **fields,
        )
    )


def session(session_id: str = "ses_a", **fields: Any) -> session_pb2.Session:
    return session_pb2.Session(
        session_id=session_id, model="m", state=session_pb2.SESSION_STATE_OPEN, **fields
    )


@dataclass
class FakeGateway:
    """``turns`` and ``answers`` are played in order, one entry a call; ``seen`` has every request,
    ``tenants`` the tenant of each call."""

    target: str
    turns: deque[Sequence[Step]] = field(default_factory=deque)
    answers: deque[Message | Fail | Cut] = field(default_factory=deque)
    seen: list[Any] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    """The ``traceparent`` of each call, or nothing."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """A turn's stream has ended, by itself or because the client went away."""

    def requests(self, kind: type[Message]) -> list[Any]:
        return [request for request in self.seen if isinstance(request, kind)]

    async def unary(self, request: Message, context: aio.ServicerContext[Any, Any]) -> Any:
        self._note(request, context)
        if isinstance(request, session_pb2.CancelTurnRequest):
            self.cancelled.set()
            return session_pb2.CancelTurnResponse(status=pb.TURN_STATUS_CANCELLED)
        answer = self.answers.popleft()
        if isinstance(answer, Message):
            return answer
        return await _end(answer, context)

    async def run_turn(
        self, request: pb.RunTurnRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.TurnStream]:
        self._note(request, context)
        context.add_done_callback(lambda ctx: self.ended.set())  # type: ignore[arg-type]
        for step in self.turns.popleft():
            if isinstance(step, pb.TurnEvent):
                yield pb.TurnStream(events=[step])
            elif isinstance(step, Hang):
                self.hanging.set()
                await self.cancelled.wait()
            else:
                await _end(step, context)

    async def stream(
        self, request: Message, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        self._note(request, context)
        while self.answers:
            answer = self.answers.popleft()
            if not isinstance(answer, Message):
                await _end(answer, context)
            yield answer

    def _note(self, request: Message, context: aio.ServicerContext[Any, Any]) -> None:
        self.seen.append(request)
        metadata = dict(context.invocation_metadata() or ())
        self.tenants.append(str(metadata.get("x-sessile-tenant")))
        self.authorizations.append(str(metadata.get("authorization")))
        self.traces.append(str(metadata.get("traceparent", "")))


async def _end(how: Fail | Cut, context: aio.ServicerContext[Any, Any]) -> None:
    if isinstance(how, Fail):
        await abort(context, how.error)
    await context.abort(how.code, "cut")


@asynccontextmanager
async def serving(*options: tuple[str, int]) -> AsyncIterator[FakeGateway]:
    """A gateway on a free loopback port."""
    server = aio.server(options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    fake = FakeGateway(f"127.0.0.1:{port}")
    # Abstract for type checkers only: every method is set below.
    sessions = session_pb2_grpc.SessionServiceServicer()  # type: ignore[abstract]
    fleet = fleet_pb2_grpc.FleetServiceServicer()  # type: ignore[abstract]
    for name in ("OpenSession", "GetSession", "ListSessions", "CancelTurn", "ForkSession"):
        setattr(sessions, name, fake.unary)
    for name in ("SuspendSession", "ResumeSession", "CloseSession", "GetTranscript"):
        setattr(sessions, name, fake.unary)
    setattr(sessions, "RunTurn", fake.run_turn)  # noqa: B010 - the stubs' classes are read-only
    setattr(sessions, "WatchSession", fake.stream)  # noqa: B010
    for name in ("ListReplicas", "MigrateSession"):
        setattr(fleet, name, fake.unary)
    for name in ("WatchFleet", "DrainReplica"):
        setattr(fleet, name, fake.stream)
    session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


def listing(*replica_ids: str) -> fleet_pb2.ListReplicasResponse:
    return fleet_pb2.ListReplicasResponse(
        replicas=[
            fleet_pb2.Replica(
                ref=pb.ReplicaRef(replica_id=name, incarnation=1),
                model="m",
                engine="sim",
                endpoint="127.0.0.1:1",
                state=fleet_pb2.REPLICA_STATE_READY,
                page_size=16,
                capacity_pages=100,
                load=fleet_pb2.ReplicaLoad(sessions=2, free_pages=80),
            )
            for name in replica_ids
        ]
    )


@contextmanager
def gateway_in_a_thread() -> Iterator[FakeGateway]:
    """For tests of code that blocks its thread."""
    ready = threading.Event()
    box: list[tuple[FakeGateway, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        async with serving() as fake:
            done = asyncio.Event()
            box.append((fake, asyncio.get_running_loop(), done))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    fake, loop, done = box[0]
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
