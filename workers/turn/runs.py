"""The replica's table of running turns, and how a dispatched call finds its turn.

At most one run per session is in the table, from before its begin is written until its end is
known; so the table is what serialises calls for one session here (the store does it between
replicas).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import (
    NotOwner,
    Overloaded,
    SessileError,
    TurnInProgress,
    Unavailable,
)
from gateway.telemetry.tracing import traceparent
from statestore.ports import Appended, Missing, StoreError, StoreUnavailable, TurnEnded
from statestore.records import (
    Epoch,
    Position,
    Session,
    SessionState,
    Turn,
    TurnContext,
    UsageSum,
)
from workers.residency import ResidentSession
from workers.turn.cursor import Replay, TurnView, accepted_event
from workers.turn.ending import Broken, Redirected
from workers.turn.opening import (
    Opened,
    TurnOpening,
    check_input,
    missing_turn,
    read_output,
    resume_index,
)
from workers.turn.ports import TurnPorts, read_context, refusal
from workers.turn.repair import is_behind, put_back_unasked
from workers.turn.request import body_of
from workers.turn.run import TurnRun
from workers.turn.usage import WrittenTokens

log = logging.getLogger(__name__)

MAX_RACES = 4
"""Times a call looks again because the session's run changed under it."""
TENANT_SHARE = 3
"""A tenant takes no further place if it has so many times the places that are free."""
RETRY_MS = 1000
"""Retry delay when the replica has as many turns as it takes."""
END_WAIT_S = 5.0
"""How long a fenced or released run is waited for; it ends at its next store answer."""


@dataclass(frozen=True, slots=True)
class Found:
    """A turn to stream: what to follow, the first event, and the first output token to send."""

    view: TurnView
    accepted: types_pb2.TurnAccepted
    first: int


class TurnRuns:
    """Bounded by the turns that the engine runs and queues, of which no tenant takes all. ``tasks``
    owns the runs: they outlive the calls that start them."""

    def __init__(self, ports: TurnPorts, tasks: TaskGroup) -> None:
        self._ports = ports
        self._tasks = tasks
        self._runs: dict[str, TurnRun] = {}
        self._closed = False
        self._written = WrittenTokens()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._runs

    def get(self, session_id: str) -> TurnRun | None:
        return self._runs.get(session_id)

    def session_ids(self) -> list[str]:
        """Sessions with a running turn."""
        return list(self._runs)

    def tenants(self) -> Counter[str]:
        """How many turns of each tenant run or wait here."""
        return Counter(run.tenant for run in self._runs.values())

    def unreported_usage(self) -> Mapping[str, UsageSum]:
        """What was written for tenants and is not reported yet, see :meth:`usage_reported`."""
        return self._written.pending(self._runs.values())

    def usage_reported(self, sums: Mapping[str, UsageSum]) -> None:
        """The store has these sums."""
        self._written.reported(sums)

    def close(self) -> None:
        """Starts no further run: nobody would drive it."""
        self._closed = True

    async def end(self, run: TurnRun, ending: Broken | Redirected | None) -> None:
        """Has a run end: as told, or (None) as the store says. Raises Unavailable if that takes
        too long."""
        if ending is None:
            run.look()
        else:
            run.leave(ending)
        with anyio.move_on_after(END_WAIT_S):
            while run.ending is None:
                await run.changed(END_WAIT_S)
        if run.ending is None:
            raise Unavailable(
                "the turn that runs here goes on: the store has this replica as the session's "
                "owner, or does not answer; try again once the session has another"
            )

    async def find(self, request: pb.DispatchTurnRequest, epoch: Epoch) -> Found:
        """The live run, a replay from the ledger, or a new run; in this order."""
        turn = request.turn
        give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
        for _ in range(MAX_RACES):
            run, created = self._runs.get(turn.session_id), False
            if run is None or run.turn_id != turn.turn_id:
                context = await self._read(request, give_up_at)
                session, stored = context.session, context.turn
                kept = not self._holds_more(session, stored, epoch)
                if kept and stored is not None and stored.status.ended:
                    return await self._replay(request, session, stored, give_up_at)
                if kept and stored is None and turn.attach_only:
                    raise missing_turn(turn)
                salt = await self._ports.salts.of(session.tenant, give_up_at)
                run = self._runs.get(turn.session_id)
                if run is None:
                    run, created = self._start(request, epoch, context, salt), True
            if run.tenant != request.tenant:
                raise refusal(turn.session_id, Missing())
            if run.epoch < epoch:
                # The session was taken from this replica and given back: the old run is fenced.
                await self.end(run, Broken(NotOwner("the session has a newer epoch")))
                continue
            if run.epoch != epoch:
                raise NotOwner(f"session {turn.session_id} is owned under a newer epoch")
            if run.turn_id != turn.turn_id:
                await self._settled(run, give_up_at)
                if run.ending is not None:
                    continue  # a repeat, of a turn that turned out to have ended before
                opened = run.opened
                if opened is not None and opened.turn.index < session.turn_index:
                    # Its turn ended in the ledger (a cancel, a deadline), and it has not heard yet.
                    await self.end(run, None)
                    continue
                raise TurnInProgress(
                    f"turn {run.turn_id} is running", metadata={"turn_id": run.turn_id}
                )
            found = await self._opened(run, request, created, give_up_at)
            if found is not None:
                return found
        raise Unavailable(f"session {turn.session_id} keeps changing; try again")

    async def settle(self, session_id: str) -> bool:
        """Asks the store what became of a session that no turn runs of here: lets go of it if it is
        not this replica's any more, else puts back what the store lost of it, though nobody asks
        for it (P1). False if the store does not answer."""
        try:
            session = await self._ports.store.get_session(session_id)
            if session_id not in self._runs:
                resident = self._ports.residency.sort_out(session_id, session)
                if resident is not None and session is not None:
                    await self._put_back(session, resident)
        except StoreUnavailable as error:
            log.warning("the store cannot tell what became of %s: %s", session_id, error)
            return False
        except (StoreError, SessileError) as error:
            log.warning("session %s is not put right: %s", session_id, error)
        return True

    async def _put_back(self, session: Session, resident: ResidentSession) -> None:
        """A turn may be asked for meanwhile: then it puts the same back, and the later write finds
        that done."""
        outcome = await put_back_unasked(
            self._ports.store,
            session,
            resident,
            self._ports.ref,
            self._ports.codec.token_fingerprint,
        )
        if isinstance(outcome, Appended):
            log.warning("session %s: put back after lost writes", session.session_id)
            self._ports.metrics.repaired()
        elif isinstance(outcome, TurnEnded) and outcome.turn.output_end != resident.head:
            log.warning("session %s: the store went on from what it had", session.session_id)
            if session.session_id not in self._runs:
                self._ports.residency.disown(session.session_id, resident.epoch)

    def _start(
        self,
        request: pb.DispatchTurnRequest,
        epoch: Epoch,
        context: TurnContext,
        salt: bytes,
    ) -> TurnRun:
        if self._closed:
            raise Unavailable("the replica is stopping")
        turn, stored = request.turn, context.turn
        # A turn that was let in once is let in wherever it goes on.
        begins = stored is None and not turn.attach_only
        batch = begins and turn.priority == types_pb2.TURN_PRIORITY_BATCH
        self._check_room(request.tenant, batch)
        run = TurnRun(
            self._ports, request.tenant, turn.session_id, turn.turn_id, epoch, self._ended
        )
        trace = traceparent() if stored is None else body_of(stored.spec).traceparent
        opening = TurnOpening(self._ports, request, epoch, trace)

        async def open_turn() -> Opened | Turn:
            return await opening.open(context, salt)

        async def pull(opened: Opened) -> None:
            await self._ports.pull_prefix(opened.resident, request.prefix)

        self._runs[turn.session_id] = run
        began = "" if stored is None else trace
        self._tasks.start_soon(run.run, open_turn, pull, began, name=f"turn {turn.turn_id}")
        return run

    def _check_room(self, tenant: str, batch: bool) -> None:
        """Turns that can run at once are let in. In the queue, the fewer places are free, the fewer
        a tenant may have: one alone gets three quarters of all, and who has none gets the last
        (after the dynamic thresholds of Choudhury and Hahne). To a batch turn the queue is shorter:
        it finds no place in what is kept for interactive ones."""
        info = self._ports.engine.info
        if len(self._runs) < info.max_running:
            return
        queue = int(info.max_queued * self._ports.limits.batch_share) if batch else info.max_queued
        free = info.max_running + queue - len(self._runs)
        theirs = sum(run.tenant == tenant for run in self._runs.values())
        if theirs >= TENANT_SHARE * free:
            raise Overloaded(
                f"{len(self._runs)} turns run or wait on this replica, {theirs} of them this "
                f"tenant's{', too many for another batch turn' if batch else ''}",
                retry_after_ms=RETRY_MS,
            )

    def _ended(self, run: TurnRun) -> None:
        self._written.ended(run)
        if self._runs.get(run.session_id) is run:
            del self._runs[run.session_id]

    async def _settled(self, run: TurnRun, give_up_at: float) -> None:
        """Waits until the run is open, or has ended instead."""
        while run.opened is None and run.ending is None:
            if not await run.changed(max(0.0, give_up_at - anyio.current_time())):
                raise Unavailable("the turn is not open yet: the store does not answer")

    def _holds_more(self, session: Session, turn: Turn | None, epoch: Epoch) -> bool:
        """Whether the store has lost what this replica wrote as the owner: opening the turn puts it
        back first."""
        resident = self._ports.residency.get(session.session_id)
        if resident is None or resident.epoch != epoch or session.state is not SessionState.OPEN:
            return False
        return is_behind(session, turn, resident)

    async def _opened(
        self, run: TurnRun, request: pb.DispatchTurnRequest, created: bool, give_up_at: float
    ) -> Found | None:
        """The run as a view, once it is open; None if it turned out to have ended before (look in
        the ledger then)."""
        await self._settled(run, give_up_at)
        opened = run.opened
        if opened is None:
            if isinstance(run.ending, Broken):
                raise run.ending.error
            return None
        turn = request.turn
        check_input(turn, opened.turn, opened.resident.salt)
        position = _position(turn)
        if position is not None and position.length > opened.output.start.length + run.released:
            # Has the store lost what the client has, or is this run fenced and does not know yet?
            context = await self._read(request, give_up_at)
            if context.session.epoch > run.epoch:
                raise NotOwner(f"session {turn.session_id} is owned under a newer epoch")
        first = resume_index(opened.output, run.released, position)
        accepted = accepted_event(
            opened.turn,
            opened.plan.sampling.seed,
            cached_tokens=run.cached_tokens,
            attached=not (created and opened.began),
        )
        return Found(run, accepted, first)

    async def _replay(
        self,
        request: pb.DispatchTurnRequest,
        session: Session,
        stored: Turn,
        give_up_at: float,
    ) -> Found:
        """An ended turn from the ledger; needs the token fingerprint but not the session."""
        if session.token_fingerprint != self._ports.codec.token_fingerprint:
            raise NotOwner(f"session {session.session_id} needs another tokenizer or template")
        salt = await self._ports.salts.of(session.tenant, give_up_at)
        check_input(request.turn, stored, salt)
        output = await read_output(self._ports, session, stored, salt)
        first = resume_index(output, len(output.tokens), _position(request.turn))
        seed = body_of(stored.spec).params.seed
        accepted = accepted_event(stored, seed, cached_tokens=0, attached=True)
        return Found(Replay(stored, output), accepted, first)

    async def _read(self, request: pb.DispatchTurnRequest, give_up_at: float) -> TurnContext:
        turn = request.turn
        context = await read_context(self._ports, turn.session_id, turn.turn_id, give_up_at)
        if context.session.tenant != request.tenant:
            raise refusal(turn.session_id, Missing())
        return context


def _position(turn: types_pb2.RunTurnRequest) -> Position | None:
    if not turn.HasField("resume_from"):
        return None
    return Position(turn.resume_from.length, turn.resume_from.digest)
