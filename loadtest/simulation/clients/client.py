"""One session's client: its calls and its streams, and what it knows.

It chooses any gateway for each call, reads slowly or leaves now and then, and goes on after every
error that says so. What it hears is kept, and checked as far as a client can.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import anyio
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import (
    DeadlineExceeded,
    Overloaded,
    SessileError,
    SessionClosed,
    SessionSuspended,
    StaleClient,
    TurnInProgress,
    Unavailable,
)
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.clients.requests import draw_request, is_long
from loadtest.simulation.coverage import Row
from loadtest.simulation.network import Call
from loadtest.simulation.world import World
from statestore import keys

TURN_S = 20.0
"""Time limit of a turn."""
CALL_S = 12.0
SHORT_SHARE = 0.1
"""Of the turns: their time limit is too short."""
MAX_AWAY_S = 0.3
LOSSY_AWAY_S = 1.0
"""How long a client that left a stream stays away, and the same where the store loses writes."""
STALL_SHARE = 0.06
"""Of the streams of long turns: their client stops to read."""
STALL_S = 8.0
"""How long a client may stop to read, now and then."""
TRY_AGAIN = (Unavailable, Overloaded, DeadlineExceeded)

T = TypeVar("T")


class Client:
    """All choices come from ``draw``."""

    def __init__(
        self, world: World, name: str, draw: random.Random, *, lossy: bool, tenant: str, brief: bool
    ) -> None:
        """``lossy``: the store may lose writes. The client then always says what it knows, so that
        a loss is not passed over, and accepts to be told of one. ``brief``: it asks for short
        turns."""
        self.world = world
        self.name = name
        self.draw = draw
        self.lossy = lossy
        self.tenant = tenant
        self.brief = brief
        self.batch = False
        """Its turns are batch turns."""
        self.session_id = ""
        self.turns: list[TurnHeard] = []
        self.others: list[TurnHeard] = []
        """What second listeners and late repeats heard, and who asked for another turn."""
        self.violations: list[str] = []
        self.cancelled: set[str] = set()
        """Turns that it asked to cancel."""
        self.asked_twice = False
        """It does not wait for its turns any more, and so never knows how its session stands."""
        self.known_head: pb.Precondition | None = None
        self.stalls = True
        """Now and then it stops to read for long."""
        self.lags = False
        """It reads its turn slowly, or stops to."""
        self.poison = False
        """Its turn kills whoever runs it."""
        self.operated = False
        """An operator has suspended or closed the session, or is about to."""
        self.minds_itself = False
        """It does so itself just now: operators keep out of it."""
        self.closing = False
        """It has asked for the close, which may be done though it is not answered."""
        self.closed = False
        self.vanished = False
        """It left in mid-turn and does not come back, not even to be told of a loss."""

    @property
    def heard(self) -> list[TurnHeard]:
        """Everything that it or another client of its session ever heard."""
        return [*self.turns, *self.others]

    def may(self, chance: float) -> bool:
        """Draws whether to do what not every client does."""
        return not (self.operated or self.poison) and self.draw.random() < chance

    def expect(self, condition: bool, complaint: str) -> None:
        """Notes a violation."""
        if not condition:
            self.violations.append(complaint)

    @asynccontextmanager
    async def unforgotten(self) -> AsyncIterator[None]:
        """The store does not lose what is done meanwhile. Nothing tells a client that its session
        is not suspended, closed or forked any more, though that was acknowledged: it cannot say
        what it knows with those calls, as it can with a turn. But what was lost before may still
        be missing."""
        if not self.lossy:
            yield
            return
        async with self.world.losing:
            yield

    # -- calls --------------------------------------------------------------------------------

    async def ask(self, what: Callable[[Any], Awaitable[T]], *, repeatable: bool = True) -> T:
        """One call of a gateway, repeated until it is answered."""
        while True:
            try:
                return await self.world.network.unary(
                    self._gateway(), what, CALL_S, repeatable=repeatable
                )
            except TRY_AGAIN:
                await self.back_off()

    async def cancel(self, turn_id: str, *, repeatable: bool = True) -> None:
        """Cancels a turn, whether it runs or not."""
        self.cancelled.add(turn_id)
        request = session_pb2.CancelTurnRequest(session_id=self.session_id, turn_id=turn_id)
        await self.ask(
            lambda app: app.sessions.cancel_turn(self.tenant, request), repeatable=repeatable
        )

    async def back_off(self) -> None:
        """As an error asks for."""
        await anyio.sleep(self.draw.uniform(0.02, 0.3))

    # -- turns --------------------------------------------------------------------------------

    def new_request(self, turn_id: str) -> pb.RunTurnRequest:
        """A turn that follows what this client knows."""
        request = draw_request(self.draw, self.session_id, turn_id, brief=self.brief)
        request.timeout_ms = int(1000 * self._limit_s())
        request.priority = pb.TURN_PRIORITY_BATCH if self.batch else pb.TURN_PRIORITY_INTERACTIVE
        tell = self.lossy or self.draw.random() < 0.5
        if self.known_head is not None and not self.asked_twice and tell:
            request.precondition.CopyFrom(self.known_head)
        return request

    def _limit_s(self) -> float:
        """A turn's time limit: ample, or now and then too short."""
        return self.draw.uniform(0.3, 2.0) if self.draw.random() < SHORT_SHARE else TURN_S

    async def listen(
        self, heard: TurnHeard, *, attach_only: bool = False, repeatable: bool = True
    ) -> None:
        """One stream, until it ends or the client has had enough of it."""
        request = pb.RunTurnRequest()
        request.CopyFrom(heard.request)
        request.attach_only = attach_only
        position = heard.resume_from
        if position is not None:
            request.resume_from.CopyFrom(position)
        leave_after = self.draw.randrange(1, 30) if self.draw.random() < 0.25 else -1
        slow_s = 0.2 if self.draw.random() < 0.1 else 0.0
        stalls = self.stalls and is_long(heard.request) and self.may(STALL_SHARE)
        stalls_after = self.draw.randrange(1, 8) if stalls else -1

        async def handler(app: Any, call: Call) -> None:
            await app.turns.run(self.tenant, request, CALL_S, call.put)

        messages, note = 0, self.world.timeline.note
        note(self.session_id, f"{self.name} asks for {heard.turn_id}", f"from {_place(position)}")
        heard.begin_stream()
        if any(heard is turn for turn in self.turns):
            self.lags = stalls or slow_s > 0
        gateway = self._gateway()
        serving = self.world.gateways[gateway]
        try:
            stream = self.world.network.stream(gateway, handler, CALL_S, repeatable=repeatable)
            async with aclosing(stream):
                async for message in stream:
                    for event in pb.TurnStream.FromString(message).events:
                        self._count_going_on(heard, event, gateway)
                        await self._hear(heard, event)
                    messages += 1
                    if messages == leave_after:
                        break
                    if messages == stalls_after:
                        await anyio.sleep(STALL_S)
                    await anyio.sleep(slow_s)
                else:
                    if not heard.ended:
                        heard.violations.append("I2: a stream ended without an end")
            if not heard.ended:
                longest_s = LOSSY_AWAY_S if self.lossy else MAX_AWAY_S
                await anyio.sleep(self.draw.uniform(0.0, longest_s))
        except TRY_AGAIN as error:
            note(self.session_id, f"{self.name} is to try again", error.message)
            if messages and serving.ended:
                heard.cut_off_by = gateway
            if isinstance(error, Overloaded) and error.retry_after_ms:
                self.world.coverage[Row.OVERLOAD] += 1
            await self.back_off()
        except (SessionSuspended, SessionClosed) as error:
            await self._was_operated(heard, error)
        except (TurnInProgress, StaleClient) as error:
            if not self.asked_twice:
                heard.error = error
                if self.lossy and isinstance(error, TurnInProgress):
                    await self.cancel(error.metadata["turn_id"])
                return
            heard.request.ClearField("precondition")
            await self.back_off()
        except SessileError as error:
            heard.error = error

    def _count_going_on(self, heard: TurnHeard, event: pb.TurnEvent, gateway: str) -> None:
        if event.HasField("tokens") and heard.cut_off_by:
            self.world.coverage[Row.GATEWAY_DIES] += heard.cut_off_by != gateway
            heard.cut_off_by = ""

    async def _hear(self, heard: TurnHeard, event: pb.TurnEvent) -> None:
        kind = str(event.WhichOneof("event"))
        self.world.timeline.note(self.session_id, f"{self.name} hears {heard.turn_id}: {kind}")
        heard.hear(event)
        self._must_be_journalled(heard)
        if kind == "waiting" and self.may(0.1):
            await self.cancel(heard.turn_id)

    async def _was_operated(self, heard: TurnHeard, error: SessileError) -> None:
        """An operator may have paused the session: it goes on. Or ended it."""
        if not self.operated or self.minds_itself:
            heard.error = error
        elif isinstance(error, SessionClosed):
            heard.error, self.closed = error, True
        else:
            request = session_pb2.ResumeSessionRequest(session_id=self.session_id)
            try:
                async with self.unforgotten():
                    await self.ask(
                        lambda app: app.sessions.resume(self.tenant, request), repeatable=False
                    )
            except SessionClosed:
                heard.error, self.closed = error, True

    def _must_be_journalled(self, heard: TurnHeard) -> None:
        """Not where the store loses writes: what is on its way was in the ledger when it was sent,
        and that is judged there."""
        if self.lossy or heard.start is None:
            return
        record = self.world.server.peek(keys.session_key(self.session_id))
        length = int(record[b"length"]) if isinstance(record, dict) else 0
        if heard.start.length + len(heard.tokens) > length:
            heard.violations.append("I2: tokens were delivered before they were journalled")

    def _gateway(self) -> str:
        return self.draw.choice(sorted(self.world.gateways))


def _place(position: pb.Position | None) -> str:
    return "its beginning" if position is None else str(position.length)
