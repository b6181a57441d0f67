"""Simulated agents: clients that run turns in a session, and behave as clients may.

They leave and come back through another gateway, read slowly, listen twice, cancel, ask for another
turn while one runs, and go on after every error that says so.
"""

from __future__ import annotations

import random

import anyio
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import (
    DataLoss,
    SessileError,
    SessionClosed,
    StaleClient,
    TurnCancelled,
    TurnInProgress,
)
from loadtest.simulation.clients.client import TURN_S, Client
from loadtest.simulation.clients.companions import ask_twice, cancel_later, listen_too, repeat_late
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.world import World

TENANT = "acme"
TENANTS = (TENANT, "bravo")
"""They say the same things, and must not notice each other."""
PATIENCE_S = 30.0
"""How long after its time limit a client still asks for a turn's end."""
CANCEL_BEFORE_SHARE = 0.04
"""Of the turns: they are cancelled before they are asked for."""
REPEAT_SHARE = 0.4
"""Of the turns where the store loses writes: they are asked for once more, late."""
SESSION_SEED = 1234
"""Of sessions that have a seed of their own."""
LOSS = (DataLoss, StaleClient, TurnInProgress)
"""How a client is told that the store lost what it knows. The last: the end of its last turn was
lost, together with the replica that could have written it again."""


class Agent(Client):
    """One session's client, with the habits of an agent."""

    def __init__(
        self,
        world: World,
        name: str,
        draw: random.Random,
        *,
        lossy: bool = False,
        tenant: str = TENANT,
        brief: bool = False,
        batch: bool = False,
    ) -> None:
        """See Client; ``brief``: it also asks for no turn once the faults are over; ``batch``: its
        turns are batch turns."""
        super().__init__(world, name, draw, lossy=lossy, tenant=tenant, brief=brief)
        self.batch = batch
        self.opened_at = 0.0
        self.forks = 0
        self.suspensions = 0
        self.purged = False
        self.said: list[int] = []
        """Its ledger when it was closed."""
        self.said_more = False
        """A turn ran just before, and the rest of its output was purged with the session."""
        self.losses = 0
        """Times it was told of a loss."""
        self._waits_for: str | None = None
        self._prefix = ""
        self._asked = 0

    @property
    def waits_for(self) -> str | None:
        """The turn that it is in. None while it reads slowly where the store loses writes: its turn
        may have ended long ago, and what is lost of it comes back when its client goes on."""
        return None if self.lossy and self.lags else self._waits_for

    def child(self, name: str, session_id: str) -> Agent:
        """The agent of a fork of this one's session."""
        draw = random.Random(self.draw.random())
        agent = Agent(self.world, name, draw, tenant=self.tenant, lossy=self.lossy)
        self.world.tenants[session_id] = self.tenant
        agent.session_id, agent._prefix = session_id, f"{name} "
        agent.opened_at = anyio.current_time()
        return agent

    @property
    def may_be_operated(self) -> bool:
        """Whether it can tell what an operator did to its session."""
        ready = bool(self.session_id) and not (self.closed or self.minds_itself)
        return ready and not (self.operated or self.poison)

    async def pause(self) -> None:
        """As long as a tool takes."""
        slow = self.draw.random() < 0.1
        await anyio.sleep(self.draw.expovariate(0.5 if slow else 3.0))

    async def open(self) -> None:
        """Opens the session; a retry finds it."""
        leading = self.draw.choice(["Be brief.", "You are a pirate who answers in rhymes. " * 3])
        request = session_pb2.OpenSessionRequest(
            request_id=self.name,
            messages=[pb.Message(role=pb.Message.ROLE_SYSTEM, content=leading)],
        )
        if self.draw.random() < 0.3:
            request.default_params.seed = SESSION_SEED
        response = await self.ask(lambda app: app.sessions.open(self.tenant, request))
        self.session_id = response.session.session_id
        self.world.tenants[self.session_id] = self.tenant
        self.opened_at = anyio.current_time()

    async def be_refused(self, *reasons: type[SessileError]) -> None:
        """Asks for a turn that must not begin."""
        heard = TurnHeard(self.session_id, "refused", self.new_request("refused"))
        heard.request.ClearField("precondition")
        while not heard.ended:
            await self.listen(heard, repeatable=False)
        refused = isinstance(heard.error, reasons) and heard.start is None
        self.expect(refused, f"I3: not refused but {heard.error or heard.finished!r}")
        self.violations += heard.violations

    async def turn(self) -> None:
        """Runs one turn to its end, whatever it takes."""
        heard = self._next_turn()
        turn_id = self._waits_for = heard.turn_id
        until = anyio.current_time() + TURN_S + PATIENCE_S
        if self.may(CANCEL_BEFORE_SHARE):
            await self.cancel(turn_id, repeatable=False)
        async with anyio.create_task_group() as helpers:
            if self.draw.random() < 0.15 and not self.poison:
                helpers.start_soon(cancel_later, self, heard)
            if self.draw.random() < (0.5 if self.lossy else 0.2):
                helpers.start_soon(listen_too, self, heard, until)
            # Who asked twice does not know which turn came last: it could not be told of a loss.
            if not self.lossy and self.may(0.1):
                helpers.start_soon(ask_twice, self, f"{turn_id}b")
            while not heard.ended:
                if anyio.current_time() > until:
                    self.violations.append(f"I7: {turn_id} has no end")
                    break
                await self.listen(heard)
            helpers.cancel_scope.cancel()
        self._waits_for = None
        self._conclude(heard)
        if self.lossy and heard.finished is not None and self.draw.random() < REPEAT_SHARE:
            self.world.tasks.start_soon(repeat_late, self, heard, name=f"{self.name} again")

    async def vanish(self) -> None:
        """Asks for a turn, and leaves for good in the middle of it: whoever runs it may die."""
        heard = self._next_turn()
        heard.request.timeout_ms = self.draw.randrange(500, 3000)
        with anyio.move_on_after(self.draw.uniform(0.0, 1.0)):
            await self.listen(heard)
        self.vanished = True
        if heard.ended:
            self._conclude(heard)
        if self.lossy:
            self.give_up()  # it does not come back to be told

    def _next_turn(self) -> TurnHeard:
        turn_id = f"{self._prefix}t{self._asked}"
        self._asked += 1
        heard = TurnHeard(self.session_id, turn_id, self.new_request(turn_id))
        self.turns.append(heard)
        return heard

    def give_up(self, turn_id: str | None = None) -> None:
        """From now on the ledger need not have any more what was heard until now (of this turn)."""
        for heard in self.heard:
            heard.given_up |= turn_id in (None, heard.turn_id)

    def _conclude(self, heard: TurnHeard) -> None:
        if isinstance(heard.error, TurnCancelled) and heard.turn_id in self.cancelled:
            return
        if self.poison:
            done = heard.finished
            ended = done is not None and done.status == pb.TURN_STATUS_FAILED
            self.expect(ended, f"P10: {heard.turn_id} kills its replicas and did not fail")
            return
        if self.operated and self.closed and isinstance(heard.error, SessionClosed):
            if self.lossy:
                self.give_up(heard.turn_id)  # lost, perhaps, before it was heard and closed
            return
        if self.lossy and isinstance(heard.error, LOSS):
            self.losses += 1
            self.give_up()
            self.known_head = None
        elif heard.error is not None:
            self.violations.append(
                f"I7: {heard.turn_id}: {type(heard.error).__name__}: {heard.error}"
            )
        elif heard.finished is not None and not self.asked_twice:
            index = 1 + heard.index
            self.known_head = pb.Precondition(head=heard.finished.end, turn_index=index)
