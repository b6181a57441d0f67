"""Simulated agents: clients that run turns in a session, and behave as clients may.

They leave and come back through another gateway, read slowly, listen twice, cancel, ask for another
turn while one runs, and go on after every error that says so. What they hear is kept, and checked
as far as a client can.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import (
    DataLoss,
    DeadlineExceeded,
    NotFound,
    NotOwner,
    Overloaded,
    SessileError,
    SessionClosed,
    SessionSuspended,
    StaleClient,
    TurnCancelled,
    TurnInProgress,
    Unavailable,
)
from loadtest.simulation.coverage import Row
from loadtest.simulation.network import Call
from loadtest.simulation.world import World
from statestore import keys

TENANT = "acme"
TENANTS = (TENANT, "bravo")
"""They say the same things, and must not notice each other."""
TURN_S = 20.0
"""Time limit of a turn."""
PATIENCE_S = 30.0
"""How long after its time limit a client still asks for a turn's end."""
CALL_S = 12.0
SHORT_SHARE = 0.1
"""Of the turns: their time limit is too short."""
CANCEL_BEFORE_SHARE = 0.04
"""Of the turns: they are cancelled before they are asked for."""
REPEATS = 3
REPEAT_SHARE = 0.4
"""Of the turns where the store loses writes: they are asked for once more, late."""
MAX_AWAY_S = 0.3
LOSSY_AWAY_S = 1.0
"""How long a client that left a stream stays away, and the same where the store loses writes."""
LONG_TOKENS = 80
STALL_SHARE = 0.06
"""Of the streams of long turns: their client stops to read."""
STALL_S = 8.0
"""How long a client may stop to read, now and then."""
SESSION_SEED = 1234
"""Of sessions that have a seed of their own."""
TRY_AGAIN = (Unavailable, Overloaded, DeadlineExceeded)
LOSS = (DataLoss, StaleClient, TurnInProgress)
"""How a client is told that the store lost what it knows. The last: the end of its last turn was
lost, together with the replica that could have written it again."""


T = TypeVar("T")


@dataclass
class TurnHeard:
    """One turn as one client has it, over all of its streams."""

    session_id: str
    turn_id: str
    request: pb.RunTurnRequest
    start: pb.Position | None = None
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)
    """Ledger position -> digest, as told."""
    text: str = ""
    finished: pb.TurnFinished | None = None
    error: SessileError | None = None
    moves: int = 0
    violations: list[str] = field(default_factory=list)
    _accepted: bool = False

    @property
    def asks_for_no_seed(self) -> bool:
        return not self.request.params.HasField("seed")

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.error is not None

    @property
    def resume_from(self) -> pb.Position | None:
        """The last place this client has; None before the first token."""
        if self.start is None or not self.tokens:
            return None
        length = self.start.length + len(self.tokens)
        return pb.Position(length=length, digest=self.digests[length])

    def begin_stream(self) -> None:
        """A new stream of the turn follows."""
        self._accepted = False

    def hear(self, event: pb.TurnEvent) -> None:
        """Takes one event."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self._expect(self.start in (None, event.accepted.output_start), "the output moved")
            self._expect(not self._accepted, "accepted a second time in one stream")
            self.start, self._accepted = event.accepted.output_start, True
            self.index = event.accepted.turn_index
        elif kind == "tokens":
            self._tokens(event.tokens)
        elif kind == "moved":
            self.moves += 1
        elif kind == "finished":
            self._expect(self.finished is None, "finished twice")
            self.finished = event.finished
            self._text(event.finished.text, event.finished.text_offset)
            self._expect(len(self.text) == event.finished.text_end, "the text ends elsewhere")
        else:
            self._expect(kind == "waiting", f"unexpected {kind}")

    def _tokens(self, tokens: pb.TurnTokens) -> None:
        if self.start is None or not self._accepted:
            self.violations.append("I2: tokens before the turn was accepted")
            return
        expected = self.start.length + len(self.tokens)
        self._expect(tokens.position == expected, f"tokens at {tokens.position}, not {expected}")
        self.tokens += tokens.token_ids
        self.digests[expected + len(tokens.token_ids)] = tokens.digest
        self._text(tokens.text, tokens.text_offset)

    def _text(self, text: str, offset: int) -> None:
        if text:
            self._expect(offset == len(self.text), f"text at {offset}, not {len(self.text)}")
        self.text += text

    def _expect(self, condition: bool, complaint: str) -> None:
        if not condition:
            self.violations.append(f"I2: {complaint}")


class Agent:
    """One session's client. All choices come from ``draw``."""

    def __init__(
        self,
        world: World,
        name: str,
        draw: random.Random,
        *,
        lossy: bool = False,
        tenant: str = TENANT,
        brief: bool = False,
    ) -> None:
        """``lossy``: the store may lose writes. The client then always says what it knows, so that
        a loss is not passed over, and accepts to be told of one. ``brief``: it asks for short
        turns, and for none once the faults are over."""
        self.tenant = tenant
        self.brief = brief
        self.operated = False
        """An operator has suspended or closed the session, or is about to."""
        self.minds_itself = False
        """It does so itself just now: operators keep out of it."""
        self.world = world
        self.name = name
        self.session_id = ""
        self.opened_at = 0.0
        self.forks = 0
        self.suspensions = 0
        self.closed = False
        self.purged = False
        self.losses = 0
        self.turns: list[TurnHeard] = []
        self.others: list[TurnHeard] = []
        """What second listeners heard."""
        self.violations: list[str] = []
        self.waits_for: str | None = None
        """The turn that it is in."""
        self.vanished = False
        """It left in mid-turn and does not come back."""
        self.stalls = True
        """Now and then it stops to read for long."""
        self.poison = False
        """Its turn kills whoever runs it."""
        self._draw = draw
        self._lossy = lossy
        self.cancelled: set[str] = set()
        """Turns that it asked to cancel: they end where the store has them, also if that has just
        lost what their owner would have repaired."""
        self._prefix = ""
        self._asked = 0
        self._known_head: pb.Precondition | None = None
        self.asked_twice = False

    def child(self, name: str, session_id: str) -> Agent:
        """The agent of a fork of this one's session."""
        agent = Agent(self.world, name, random.Random(self._draw.random()), tenant=self.tenant)
        self.world.tenants[session_id] = self.tenant
        agent.session_id, agent._prefix = session_id, f"{name} "
        agent.opened_at = anyio.current_time()
        return agent

    def may(self, chance: float) -> bool:
        """Draws whether to do what not every client does. Where the store loses writes there is
        none of it: clients could not know what became of it."""
        plain = self._lossy or self.operated or self.poison
        return not plain and self._draw.random() < chance

    @property
    def may_be_operated(self) -> bool:
        """Whether it can tell what an operator did to its session."""
        ready = bool(self.session_id) and not (self.closed or self.minds_itself)
        return ready and not (self._lossy or self.operated or self.poison)

    def expect(self, condition: bool, complaint: str) -> None:
        """Notes a violation."""
        if not condition:
            self.violations.append(complaint)

    async def pause(self) -> None:
        """As long as a tool takes."""
        slow = self._draw.random() < 0.1
        await anyio.sleep(self._draw.expovariate(0.5 if slow else 3.0))

    async def open(self) -> None:
        """Opens the session; a retry finds it."""
        leading = self._draw.choice(["Be brief.", "You are a pirate who answers in rhymes. " * 3])
        request = session_pb2.OpenSessionRequest(
            request_id=self.name,
            messages=[pb.Message(role=pb.Message.ROLE_SYSTEM, content=leading)],
        )
        if self._draw.random() < 0.3:
            request.default_params.seed = SESSION_SEED
        response = await self.ask(lambda app: app.sessions.open(self.tenant, request))
        self.session_id = response.session.session_id
        self.world.tenants[self.session_id] = self.tenant
        self.opened_at = anyio.current_time()

    async def look_round(self) -> None:
        """Reads what was said, and all it may see; tries to touch what it may not (I10)."""
        read = session_pb2.GetTranscriptRequest(session_id=self.session_id)
        try:
            transcript = await self.ask(lambda app: app.sessions.transcript(self.tenant, read))
        except (NotOwner, NotFound):
            transcript = session_pb2.GetTranscriptResponse()  # purged by whoever may
        texts = {turn.turn_id: turn.output_text for turn in transcript.turns}
        for heard in self.turns:
            if heard.finished is not None and heard.turn_id in texts:
                same = texts[heard.turn_id] == heard.text
                self.expect(same, f"P17: the transcript of {heard.turn_id} says something else")
        every = session_pb2.ListSessionsRequest(page_size=100)
        listed = await self.ask(lambda app: app.sessions.list(self.tenant, every))
        tenants = self.world.tenants
        for session in listed.sessions:
            mine = tenants.get(session.session_id, self.tenant) == self.tenant
            self.expect(mine, f"I10: {self.tenant} lists {session.session_id}")
        foreign = [name for name, tenant in sorted(tenants.items()) if tenant != self.tenant]
        if foreign:
            await self._touch(self._draw.choice(foreign))

    async def _touch(self, session_id: str) -> None:
        what, request = self._draw.choice(
            [
                ("get", session_pb2.GetSessionRequest(session_id=session_id)),
                ("transcript", session_pb2.GetTranscriptRequest(session_id=session_id)),
                ("fork", session_pb2.ForkSessionRequest(session_id=session_id, request_id="theft")),
                ("cancel_turn", session_pb2.CancelTurnRequest(session_id=session_id, turn_id="t0")),
                ("close", session_pb2.CloseSessionRequest(session_id=session_id, purge=True)),
                ("run", pb.RunTurnRequest(session_id=session_id, turn_id="t0", attach_only=True)),
            ]
        )

        async def theft(app: Any) -> Any:
            if what == "run":
                return await app.turns.run(self.tenant, request, CALL_S, _drop)
            return await getattr(app.sessions, what)(self.tenant, request)

        try:
            await self.ask(theft)
        except NotFound as error:
            same = error.message == f"no session {session_id!r}"
            self.expect(same, f"I10: {what} of another tenant's session tells: {error.message}")
            return
        self.violations.append(f"I10: {self.tenant} may {what} {session_id}")

    async def ask(self, what: Callable[[Any], Awaitable[T]], *, repeatable: bool = True) -> T:
        """One call of a gateway, repeated until it is answered."""
        while True:
            try:
                return await self.world.network.unary(
                    self._gateway(), what, CALL_S, repeatable=repeatable
                )
            except TRY_AGAIN:
                await self._back_off()

    async def be_refused(self, *reasons: type[SessileError]) -> None:
        """Asks for a turn that must not begin."""
        heard = TurnHeard(self.session_id, "refused", self._new_request("refused"))
        heard.request.ClearField("precondition")
        while not heard.ended:
            await self._try(heard, attach_only=False, repeatable=False)
        refused = isinstance(heard.error, reasons) and heard.start is None
        self.expect(refused, f"I3: not refused but {heard.error or heard.finished!r}")

    async def turn(self) -> None:
        """Runs one turn to its end, whatever it takes."""
        turn_id = f"{self._prefix}t{self._asked}"
        self._asked += 1
        heard = TurnHeard(self.session_id, turn_id, self._new_request(turn_id))
        self.turns.append(heard)
        until = anyio.current_time() + TURN_S + PATIENCE_S
        self.waits_for = turn_id
        if self.may(CANCEL_BEFORE_SHARE):
            await self._cancel(turn_id, repeatable=False)
        async with anyio.create_task_group() as helpers:
            if self._draw.random() < 0.15 and not self.poison:
                helpers.start_soon(self._cancel_later, heard)
            if self._draw.random() < (0.5 if self._lossy else 0.2):
                helpers.start_soon(self._listen_too, heard, until)
            if self.may(0.1):
                helpers.start_soon(self._ask_twice, f"{turn_id}b")
            while not heard.ended:
                if anyio.current_time() > until:
                    self.violations.append(f"I7: {turn_id} has no end")
                    break
                await self._try(heard, attach_only=False)
            helpers.cancel_scope.cancel()
        self.waits_for = None
        self._conclude(heard)
        if self._lossy and heard.finished is not None and self._draw.random() < REPEAT_SHARE:
            self.world.tasks.start_soon(self._repeat_late, heard, name=f"{self.name} again")

    async def vanish(self) -> None:
        """Asks for a turn, and leaves for good in the middle of it: whoever runs it may die."""
        turn_id = f"{self._prefix}t{self._asked}"
        request = self._new_request(turn_id)
        request.timeout_ms = self._draw.randrange(500, 3000)
        heard = TurnHeard(self.session_id, turn_id, request)
        self.turns.append(heard)
        with anyio.move_on_after(self._draw.uniform(0.0, 1.0)):
            await self._try(heard, attach_only=False)
        self.vanished = True

    def _new_request(self, turn_id: str) -> pb.RunTurnRequest:
        draw = self._draw
        words = draw.choices(["look", "at", "this", "and", "that", "é€"], k=draw.randrange(1, 30))
        params = pb.SamplingParams(
            max_tokens=10 if self.brief else draw.choice([1, 20, 40, 80, 120]),
            temperature=draw.choice([0.0, 1.0]),
        )
        if draw.random() < 0.5:
            params.seed = draw.randrange(1 << 40)
        if draw.random() < 0.2:
            params.stop.append(draw.choice(["a", "qu", "the"]))
        if draw.random() < 0.1:
            params.ignore_eos = True
        request = pb.RunTurnRequest(
            session_id=self.session_id,
            turn_id=turn_id,
            messages=[pb.Message(role=pb.Message.ROLE_USER, content=" ".join(words))],
            params=params,
            timeout_ms=int(1000 * (TURN_S if self._lossy else self._limit_s())),
        )
        tell = self._lossy or draw.random() < 0.5
        if self._known_head is not None and not self.asked_twice and tell:
            request.precondition.CopyFrom(self._known_head)
        return request

    def _limit_s(self) -> float:
        """A turn's time limit: ample, or now and then too short. Never where the store loses
        writes: a turn whose end was lost would end FAILED before its owner comes to repair it."""
        return self._draw.uniform(0.3, 2.0) if self._draw.random() < SHORT_SHARE else TURN_S

    async def _try(self, heard: TurnHeard, *, attach_only: bool, repeatable: bool = True) -> None:
        """One stream, until it ends or the client has had enough of it."""
        request = pb.RunTurnRequest()
        request.CopyFrom(heard.request)
        request.attach_only = attach_only
        position = heard.resume_from
        if position is not None:
            request.resume_from.CopyFrom(position)
        leave_after = self._draw.randrange(1, 30) if self._draw.random() < 0.25 else -1
        slow_s = 0.2 if self._draw.random() < 0.1 else 0.0
        long = heard.request.params.max_tokens >= LONG_TOKENS
        stalls = self.stalls and long and self.may(STALL_SHARE)
        stalls_after = self._draw.randrange(1, 8) if stalls else -1

        async def handler(app: Any, call: Call) -> None:
            await app.turns.run(self.tenant, request, CALL_S, call.put)

        messages, note = 0, self.world.timeline.note
        note(self.session_id, f"{self.name} asks for {heard.turn_id}", f"from {_place(position)}")
        heard.begin_stream()
        try:
            stream = self.world.network.stream(
                self._gateway(), handler, CALL_S, repeatable=repeatable
            )
            async with aclosing(stream):
                async for message in stream:
                    for event in pb.TurnStream.FromString(message).events:
                        kind = str(event.WhichOneof("event"))
                        note(self.session_id, f"{self.name} hears {heard.turn_id}: {kind}")
                        heard.hear(event)
                        self._must_be_journalled(heard)
                        if kind == "waiting" and self.may(0.1):
                            await self._cancel(heard.turn_id)
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
                longest_s = LOSSY_AWAY_S if self._lossy else MAX_AWAY_S
                await anyio.sleep(self._draw.uniform(0.0, longest_s))
        except TRY_AGAIN as error:
            note(self.session_id, f"{self.name} is to try again", error.message)
            if isinstance(error, Overloaded) and error.retry_after_ms:
                self.world.coverage[Row.OVERLOAD] += 1
            await self._back_off()
        except (SessionSuspended, SessionClosed) as error:
            await self._was_operated(heard, error)
        except (TurnInProgress, StaleClient) as error:
            if not self.asked_twice:
                heard.error = error
                if self._lossy and isinstance(error, TurnInProgress):
                    await self._cancel(error.metadata["turn_id"])
                return
            heard.request.ClearField("precondition")
            await self._back_off()
        except SessileError as error:
            heard.error = error

    async def _was_operated(self, heard: TurnHeard, error: SessileError) -> None:
        """An operator may have paused the session: it goes on. Or ended it."""
        if not self.operated or self.minds_itself:
            heard.error = error
        elif isinstance(error, SessionClosed):
            heard.error, self.closed = error, True
        else:
            request = session_pb2.ResumeSessionRequest(session_id=self.session_id)
            try:
                await self.ask(
                    lambda app: app.sessions.resume(self.tenant, request), repeatable=False
                )
            except SessionClosed:
                heard.error, self.closed = error, True

    def _must_be_journalled(self, heard: TurnHeard) -> None:
        if self._lossy or heard.start is None:
            return
        record = self.world.server.peek(keys.session_key(self.session_id))
        length = int(record[b"length"]) if isinstance(record, dict) else 0
        if heard.start.length + len(heard.tokens) > length:
            heard.violations.append("I2: tokens were delivered before they were journalled")

    async def _cancel_later(self, heard: TurnHeard) -> None:
        await anyio.sleep(self._draw.uniform(0.0, 0.8))
        await self._cancel(heard.turn_id)

    async def _cancel(self, turn_id: str, *, repeatable: bool = True) -> None:
        self.cancelled.add(turn_id)
        request = session_pb2.CancelTurnRequest(session_id=self.session_id, turn_id=turn_id)
        await self.ask(
            lambda app: app.sessions.cancel_turn(self.tenant, request), repeatable=repeatable
        )

    async def _listen_too(self, main: TurnHeard, until: float) -> None:
        """A second client of the same turn, from its beginning."""
        await anyio.sleep(self._draw.uniform(0.0, 1.0))
        heard = TurnHeard(main.session_id, main.turn_id, main.request)
        self.others.append(heard)
        while not heard.ended and anyio.current_time() < until:
            # Where the store loses writes this client may begin the turn anew.
            await self._try(heard, attach_only=not self._lossy)
            if isinstance(heard.error, NotFound):
                heard.error = None  # the turn has not begun yet
                await self._back_off()

    async def _repeat_late(self, main: TurnHeard) -> None:
        """A proxy of the client sends a request again that was answered long ago. If the store has
        lost the turn together with its owner, that begins another one of the same id."""
        for _ in range(REPEATS):
            await anyio.sleep(self._draw.uniform(0.0, 0.4))
            again = TurnHeard(main.session_id, main.turn_id, main.request)
            await self._try(again, attach_only=False)

    async def _ask_twice(self, turn_id: str) -> None:
        """Another turn while one runs: refused, unless the first has just ended."""
        await anyio.sleep(self._draw.uniform(0.0, 0.5))
        heard = TurnHeard(self.session_id, turn_id, self._new_request(turn_id))
        heard.request.ClearField("precondition")
        self.others.append(heard)
        self.asked_twice = True
        while not heard.ended:
            await self._try(heard, attach_only=False)

    def _conclude(self, heard: TurnHeard) -> None:
        if isinstance(heard.error, TurnCancelled) and heard.turn_id in self.cancelled:
            if self._lossy:
                self.turns.remove(heard)  # it had begun, perhaps, and that was lost
                self.others.clear()
            return
        if self.poison:
            done = heard.finished
            ended = done is not None and done.status == pb.TURN_STATUS_FAILED
            self.expect(ended, f"P10: {heard.turn_id} kills its replicas and did not fail")
            return
        if self.operated and self.closed:
            return
        if self._lossy and isinstance(heard.error, LOSS):
            # Told of a loss: nothing that it heard before needs to be in the ledger any more.
            self.losses += 1
            self.turns.clear()
            self.others.clear()
            self._known_head = None
        elif heard.error is not None:
            self.violations.append(
                f"I7: {heard.turn_id}: {type(heard.error).__name__}: {heard.error}"
            )
        elif heard.finished is not None and not self.asked_twice:
            index = 1 + heard.index
            self._known_head = pb.Precondition(head=heard.finished.end, turn_index=index)

    def _gateway(self) -> str:
        return self._draw.choice(sorted(self.world.gateways))

    async def _back_off(self) -> None:
        await anyio.sleep(self._draw.uniform(0.02, 0.3))


async def _drop(message: bytes) -> None:
    """A sink for what must never be sent."""
    del message


def _place(position: pb.Position | None) -> str:
    return "its beginning" if position is None else str(position.length)
