"""Clients of the fleet: raw gRPC, so that what is checked (positions, digests) is what was sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import anyio
from grpc import aio
from sessile.v1 import fleet_pb2_grpc, session_pb2, session_pb2_grpc
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import (
    DeadlineExceeded,
    Overloaded,
    TurnInProgress,
    Unavailable,
)
from gateway.rpc.status import error_from_rpc
from loadtest.simulation.clients.agents import LOSS
from loadtest.simulation.clients.heard import TurnHeard

TURN_S = 40.0
PATIENCE_S = 20.0
CALL_S = 4.0
SILENCE_S = 4.0
"""A stream without a word for this long is left for another gateway (both ends say something every
two seconds)."""
TRY_AGAIN = (Unavailable, Overloaded, DeadlineExceeded)
OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass
class Heard(TurnHeard):
    """With times, and with everything that came, in order or not."""

    began: float = 0.0
    ended_at: float = 0.0
    arrivals: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, position, tokens) of each Tokens event."""
    streams: int = 0
    replicas: list[str] = field(default_factory=list)
    on_token: Callable[[Heard], None] | None = None

    def hear(self, event: pb.TurnEvent) -> None:
        super().hear(event)
        kind = event.WhichOneof("event")
        now = anyio.current_time()
        if kind == "accepted":
            self.replicas.append(event.accepted.replica.replica_id)
        elif kind == "moved":
            self.replicas.append(event.moved.to.replica_id)
        elif kind == "tokens":
            self.arrivals.append((now, event.tokens.position, len(event.tokens.token_ids)))
            if self.on_token is not None:
                self.on_token(self)
        elif kind == "finished":
            self.ended_at = now

    @property
    def worst_gap_s(self) -> float:
        times = [self.began, *(at for at, _, _ in self.arrivals), self.ended_at or self.began]
        return max(b - a for a, b in pairwise(times))


class Door:
    """One agent's connection to one gateway."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.endpoint = endpoint
        self.channel = aio.insecure_channel(endpoint, options=OPTIONS)
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(self.channel)
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(self.channel)


class Agent:
    """One session's client. It stays with a gateway until that fails it."""

    notices_silence_s = 0.0
    """How long it may take to notice that a gateway fell silent, beyond what every class of faults
    allows for."""

    def __init__(
        self,
        name: str,
        endpoints: dict[str, str],
        draw: random.Random,
        *,
        lossy: bool = False,
        tenant: str = "default",
    ) -> None:
        """``lossy``: the store may lose acknowledged writes, and the client may be told so."""
        self.name = name
        self.session_id = ""
        self.turns: list[Heard] = []
        self.violations: list[str] = []
        self.losses = 0
        self.lossy = lossy
        self.read_delay_s = 0.0
        self.temperatures = [0.0, 1.0]
        self._metadata = (("x-sessile-tenant", tenant),)
        self.doors = [Door(*item) for item in endpoints.items()]
        self._draw = draw
        self._known: pb.Precondition | None = None
        self._numbers = count()

    @property
    def door(self) -> Door:
        return self.doors[0]

    def prefer(self, gateway: str) -> None:
        """Uses this gateway first."""
        self.doors.sort(key=lambda door: door.name != gateway)

    async def aclose(self) -> None:
        for door in self.doors:
            await door.channel.close()

    # -- calls --------------------------------------------------------------------------------

    async def call(self, ask: Callable[[Door], Any], limit_s: float = TURN_S) -> Any:
        """A unary call, repeated at one gateway after the other until it is answered."""
        until = anyio.current_time() + limit_s
        while True:
            try:
                return await ask(self.door)
            except aio.AioRpcError as rpc:
                error = error_from_rpc(rpc)
                if not isinstance(error, TRY_AGAIN) or anyio.current_time() > until:
                    raise error from rpc
                await self._next_gateway()

    async def open(self) -> None:
        """Opens the session; a retry finds it."""
        request = session_pb2.OpenSessionRequest(
            request_id=self.name,
            messages=[pb.Message(role=pb.Message.ROLE_SYSTEM, content="Be brief.")],
        )
        answer = await self.call(self._unary("OpenSession", request))
        self.session_id = answer.session.session_id

    async def close(self) -> None:
        request = session_pb2.CloseSessionRequest(session_id=self.session_id)
        await self.call(self._unary("CloseSession", request))

    async def cancel(self, turn_id: str) -> None:
        request = session_pb2.CancelTurnRequest(session_id=self.session_id, turn_id=turn_id)
        await self.call(self._unary("CancelTurn", request))

    def _unary(self, method: str, request: object) -> Callable[[Door], Any]:
        return lambda door: getattr(door.sessions, method)(
            request, timeout=CALL_S, metadata=self._metadata
        )

    # -- turns --------------------------------------------------------------------------------

    def next_turn(self, *, tokens: int = 40, prompt_chars: int = 30) -> Heard:
        """The next turn, not yet asked for."""
        turn_id = f"t{next(self._numbers)}"
        words = self._draw.choices(["look", "at", "this", "é€", "and", "that"], k=prompt_chars // 4)
        request = pb.RunTurnRequest(
            session_id=self.session_id,
            turn_id=turn_id,
            messages=[pb.Message(role=pb.Message.ROLE_USER, content=" ".join(words))],
            params=pb.SamplingParams(
                max_tokens=tokens,
                temperature=self._draw.choice(self.temperatures),
                seed=self._draw.randrange(1 << 40),
                ignore_eos=True,
            ),
            timeout_ms=int(TURN_S * 1000),
        )
        if self._known is not None:
            request.precondition.CopyFrom(self._known)
        heard = Heard(self.session_id, turn_id, request)
        self.turns.append(heard)
        return heard

    async def repeat(self, turn: Heard) -> Heard:
        """Another agent's turn, as it asked for it, in this agent's session."""
        request = pb.RunTurnRequest()
        request.CopyFrom(turn.request)
        request.session_id = self.session_id
        request.ClearField("precondition")
        heard = Heard(self.session_id, turn.turn_id, request)
        self.turns.append(heard)
        await self.run(heard)
        return heard

    async def run(self, heard: Heard) -> None:
        """Listens until the turn has ended, whatever it takes."""
        heard.began = anyio.current_time()
        until = heard.began + TURN_S + PATIENCE_S
        while not heard.ended:
            if anyio.current_time() > until:
                heard.violations.append("I7: it has no end")
                return
            await self.listen(heard)
        await self._conclude(heard)

    async def turn(self, *, tokens: int = 40, prompt_chars: int = 30) -> Heard:
        heard = self.next_turn(tokens=tokens, prompt_chars=prompt_chars)
        await self.run(heard)
        return heard

    async def listen(self, heard: Heard, *, leave_after: int = 0) -> None:
        """One stream, until it ends, breaks, falls silent, or ``leave_after`` messages came."""
        request = pb.RunTurnRequest()
        request.CopyFrom(heard.request)
        if heard.resume_from is not None:
            request.resume_from.CopyFrom(heard.resume_from)
        heard.begin_stream()
        heard.streams += 1
        stream = self.door.sessions.RunTurn(
            request, timeout=TURN_S + PATIENCE_S, metadata=self._metadata
        )
        messages = 0
        try:
            while True:
                message: Any = None
                with anyio.move_on_after(SILENCE_S + self.read_delay_s):
                    message = await stream.read()
                if message is None:
                    await self._next_gateway()
                    return
                if message is aio.EOF:
                    break
                for event in message.events:
                    heard.hear(event)
                messages += 1
                if messages == leave_after:
                    return
                if self.read_delay_s:
                    await anyio.sleep(self.read_delay_s)
            if not heard.ended:
                heard.violations.append("I2: a stream ended without an end")
                await self._next_gateway()
        except aio.AioRpcError as rpc:
            error = error_from_rpc(rpc)
            if heard.finished is not None:
                return  # the stream broke after its end
            if isinstance(error, TRY_AGAIN):
                await self._next_gateway()
            else:
                heard.error = error
                heard.ended_at = anyio.current_time()
        finally:
            stream.cancel()

    async def _conclude(self, heard: Heard) -> None:
        if heard.finished is not None:
            self._known = pb.Precondition(head=heard.finished.end, turn_index=1 + heard.index)
            if heard.finished.status != pb.TURN_STATUS_COMMITTED:
                heard.violations.append(f"it ended {heard.finished.status}: {heard.finished.error}")
        elif self.lossy and isinstance(heard.error, LOSS):
            self.losses += 1
            if isinstance(heard.error, TurnInProgress):
                await self.cancel(heard.error.metadata["turn_id"])
            for turn in self.turns:
                turn.given_up = True
            self._known = None
        else:
            error = heard.error
            heard.violations.append(f"{type(error).__name__}: {error}")

    async def _next_gateway(self) -> None:
        self.doors.append(self.doors.pop(0))
        await anyio.sleep(self._draw.uniform(0.02, 0.1))


async def quietly(call: Any) -> Any:
    """An operator's call that may fail: its answer, or the error."""
    try:
        return await call
    except aio.AioRpcError as error:
        return error_from_rpc(error)
