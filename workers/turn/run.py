"""One running turn: engine steps in, journalled tokens out, until it ends.

A run is a small state machine on one task. The engine delivers by callback; the task journals what
was delivered, one append at a time (what arrives meanwhile joins the next one), and only an
acknowledged append moves ``released``, which is all that streams can see (I2). Whatever ends the
run sets ``ending`` once, in the same step that takes the run out of the replica's table, so a
client that was told of the end can start the next turn at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import anyio
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import InternalError, SessileError, Unavailable
from statestore import ports as store
from statestore.ports import Append, RepairOutcome, StoreError, StoreUnavailable
from statestore.records import Epoch, FinishReason, Position, Turn, TurnResult, TurnStatus
from workers.engines.port import EngineFailed
from workers.journal import until_answered
from workers.turn.ending import Broken, Ended, Ending, Redirected, lost_session
from workers.turn.generation import Generation
from workers.turn.opening import Opened
from workers.turn.output import TurnOutput
from workers.turn.ports import TurnPorts, refusal
from workers.turn.repair import repair
from workers.turn.report import RunReport

log = logging.getLogger(__name__)

MAX_REPAIRS = 8
"""Repairs of one run without an append in between; then its streams end and may be resumed."""

OpenTurn = Callable[[], Awaitable[Opened | Turn]]
PullTurn = Callable[[Opened], Awaitable[None]]


@dataclass(slots=True)
class _Hold:
    """A hand-over: the run stands at a step boundary until released or until the lease ends."""

    migration_id: str
    until: float
    standing: bool = False


class TurnRun:
    """A turn that this replica runs under one epoch. Created when the dispatch arrives;
    :meth:`run` opens and drives it. Everything else may be called at any time."""

    def __init__(
        self,
        ports: TurnPorts,
        tenant: str,
        session_id: str,
        turn_id: str,
        epoch: Epoch,
        on_end: Callable[[TurnRun], None],
    ) -> None:
        self.tenant = tenant
        self.session_id = session_id
        self.turn_id = turn_id
        self.epoch = epoch
        self.opened: Opened | None = None
        self.released = 0
        """Output tokens that are in the ledger."""
        self.ending: Ending | None = None
        self.waiting: pb.TurnWaiting.Reason.ValueType = pb.TurnWaiting.REASON_QUEUED
        """What a stream that has nothing to send is waiting for."""
        self._ports = ports
        self._on_end = on_end
        self._changed = anyio.Event()
        self._wake = anyio.Event()
        self._pulling = anyio.CancelScope()
        self._streams = 0
        self._detached_at = anyio.current_time()
        self._generation: Generation | None = None
        self._head = Position(0, b"")
        self._repairs = 0
        self._hold: _Hold | None = None
        self._look = False
        self._told: Ending | None = None
        self._decided: tuple[FinishReason, str] | None = None
        self._unwritten: list[int] = []
        self._wrote_end: TurnResult | None = None
        """What this run has ended the turn with in the ledger."""
        self._report = RunReport(ports, tenant, session_id, turn_id)

    # -- what streams and the service use -------------------------------------------------------

    @property
    def output(self) -> TurnOutput:
        assert self.opened is not None, "only an opened turn has output"
        return self.opened.output

    @property
    def cached_tokens(self) -> int:
        """Prefix tokens found in the KV cache; an estimate before the first step."""
        return self._generation.cached_tokens if self._generation is not None else 0

    @property
    def streams(self) -> int:
        return self._streams

    async def changed(self, timeout_s: float) -> bool:
        """Waits until something changed that streams can see; False after ``timeout_s``."""
        event = self._changed
        with anyio.move_on_after(timeout_s):
            await event.wait()
        return event.is_set()

    def attach(self) -> None:
        """A stream follows this run."""
        self._streams += 1

    def detach(self) -> None:
        """A stream is gone; without any, the turn runs on for the grace period."""
        self._streams -= 1
        self._detached_at = anyio.current_time()
        self._wake.set()

    def look(self) -> None:
        """Something happened to the turn in the store (a cancel, a close): look there now."""
        self._look = True
        self._disturb()

    def leave(self, ending: Broken | Redirected) -> None:
        """Ends the run without touching the ledger: it was fenced or handed over."""
        self._told = self._told or ending
        self._disturb()

    async def hold(self, migration_id: str, lease_s: float) -> Position | None:
        """Stops at a step boundary with everything journalled, and stays there until
        :meth:`resume`, :meth:`leave` or the lease ends. Returns the ledger's end, or None if the
        turn ended (or moved on) instead."""
        hold = _Hold(migration_id, anyio.current_time() + lease_s)
        self._hold = hold
        # The generation is ended rather than parked: after a park, outputs of a step already under
        # way could still arrive.
        self._retract()
        self._disturb()
        while self.ending is None and self._hold is hold and not hold.standing:
            if not await self.changed(max(0.0, hold.until - anyio.current_time())):
                break
        return self._head if self._hold is hold and hold.standing else None

    def resume(self, migration_id: str) -> bool:
        """Ends that migration's hold; the run goes on here."""
        if self._hold is None or self._hold.migration_id != migration_id:
            return False
        self._hold = None
        self._wake.set()
        return True

    def _disturb(self) -> None:
        """Gets the task's attention; a pull of KV pages is given up for it."""
        self._pulling.cancel()
        self._wake.set()

    # -- the run --------------------------------------------------------------------------------

    async def run(self, open_turn: OpenTurn, pull: PullTurn, traceparent: str = "") -> None:
        """Opens the turn, makes its prefix resident, generates until it ends. Never raises: what
        goes wrong becomes the ending that streams report. ``traceparent``: that of a turn which
        was accepted before."""
        self._ports.residency.hold(self.session_id)
        with self._report.of_run(traceparent):
            try:
                await self._run(open_turn, pull)
            finally:
                self._report.ended(self.ending, self._wrote_end)

    async def _run(self, open_turn: OpenTurn, pull: PullTurn) -> None:
        try:
            ending = await self._drive(open_turn, pull)
        except SessileError as error:
            ending = Broken(error)
        except StoreUnavailable as error:
            ending = Broken(Unavailable(f"the store did not answer in time: {error}"))
        except EngineFailed as error:
            ending = Broken(Unavailable(f"the engine failed: {error}", reason="ENGINE_FAILED"))
        except StoreError as error:
            log.exception("turn %s of %s: store failure", self.turn_id, self.session_id)
            ending = Broken(InternalError(f"the store failed: {error}"))
        except Exception as error:
            # A bug that one turn's input triggers must not take every other turn with it; the
            # store's bound on attempts without progress ends this one.
            log.exception("turn %s of %s: unexpected failure", self.turn_id, self.session_id)
            ending = Broken(InternalError(f"the turn runner failed: {error!r}"))
        except BaseException:
            # The replica is stopping: streams must not wait for ever. What was not journalled was
            # never delivered, so nothing has to be cleaned up in the ledger.
            self._end(Broken(Unavailable("the replica is stopping")))
            raise
        self._end(ending)
        if self.opened is not None and self._wrote_end is None:
            # Perhaps because the session was closed: then its pages are not kept for a next turn.
            await self._ports.residency.look(self._ports.store, self.session_id)

    def _end(self, ending: Ending) -> None:
        self._retract()
        if isinstance(ending, Ended) and self.opened is not None:
            self.opened.resident.ended(ending.turn)
        elif lost_session(ending):
            self._ports.residency.disown(self.session_id, self.epoch)
        if self.opened is not None:
            self._unwritten += self.opened.output.tokens[self.released :]
        self.ending = ending
        self._on_end(self)
        self._ports.residency.rest(self.session_id, self._unwritten)
        self._notify()

    async def _drive(self, open_turn: OpenTurn, pull: PullTurn) -> Ending:
        with self._report.opening():
            opened = await open_turn()
        if isinstance(opened, Turn):
            return Ended(opened)
        self._report.opened(opened)
        self._head = opened.turn.output_end
        self.released = len(opened.output.tokens)
        generation = self._generation = Generation(self._ports, opened, lambda: self._wake.set())
        generation.measure()
        self.opened = opened
        self._notify()
        if opened.output.reason is None:
            self.waiting = pb.TurnWaiting.REASON_KV_TRANSFER
            self._pulling.deadline = opened.deadline_at
            with self._pulling:
                await pull(opened)
            generation.measure()
            self.waiting = pb.TurnWaiting.REASON_QUEUED
        while True:
            ending = await self._advance(opened, generation)
            if ending is not None:
                return ending

    async def _advance(self, opened: Opened, generation: Generation) -> Ending | None:
        """Does the most urgent thing, or waits for one."""
        now, output = anyio.current_time(), opened.output
        if self._told is not None:
            return self._told
        if self._look:
            self._look = False
            return await self._look_at_store(opened)
        if self._decided is not None:
            return await self._finish(opened, *self._decided)
        if output.reason is not None or len(output.tokens) > self.released:
            return await self._journal(opened, None)
        self._decided = self._to_be_ended(opened, generation, now)
        if self._decided is not None:
            return None
        if self._hold is not None:
            self._stand(self._hold, now)
        elif generation.hung(now):
            return Broken(Unavailable("the engine makes no progress", reason="ENGINE_STALLED"))
        else:
            generation.start(now)
        await self._sleep(opened, generation)
        return None

    def _to_be_ended(
        self, opened: Opened, generation: Generation, now: float
    ) -> tuple[FinishReason, str] | None:
        """A reason to end the turn that is not in its tokens."""
        if generation.failure:
            return FinishReason.ERROR, generation.failure
        if now >= opened.deadline_at:
            return FinishReason.DEADLINE, "the turn's deadline passed"
        if not self._streams and now >= self._detached_at + self._ports.limits.detach_grace_s:
            return FinishReason.CANCELLED, ""
        return None

    def _stand(self, hold: _Hold, now: float) -> None:
        if now >= hold.until:
            self._hold = None  # nobody came for the turn: it goes on here
            self._wake.set()
        elif not hold.standing:
            hold.standing = True
            self._ports.residency.pin(self.session_id, hold.until - now)
            self._notify()

    async def _sleep(self, opened: Opened, generation: Generation) -> None:
        until = self._hold.until if self._hold is not None else generation.due_at
        until = min(until, opened.deadline_at)
        if not self._streams:
            until = min(until, self._detached_at + self._ports.limits.detach_grace_s)
        with anyio.move_on_after(max(0.0, until - anyio.current_time())):
            await self._wake.wait()
        self._wake = anyio.Event()

    def _retract(self) -> None:
        if self._generation is not None:
            self._generation.retract()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # -- the ledger's side ----------------------------------------------------------------------

    async def _finish(self, opened: Opened, reason: FinishReason, error: str) -> Ending | None:
        """Ends the turn for a reason that is not in its tokens."""
        self._retract()
        cancelled = reason is FinishReason.CANCELLED
        status = TurnStatus.CANCELLED if cancelled else TurnStatus.FAILED
        opened.output.end()
        return await self._journal(opened, self._result(opened, status, reason, error))

    async def _journal(self, opened: Opened, forced: TurnResult | None) -> Ending | None:
        """Appends what is not journalled yet; with the turn's end in the same write (P5)."""
        output, generation = opened.output, self._generation
        assert generation is not None
        head, count, steps = output.seal(), len(output.tokens), generation.unacked_steps
        commit = forced
        if commit is None and output.reason is not None:
            output.end()
            commit = self._result(opened, TurnStatus.COMMITTED, output.reason, "")
        tokens = output.tokens[self.released :]
        append = Append(self.session_id, self.epoch, self.turn_id, self._head, tokens, head, commit)
        self.waiting = pb.TurnWaiting.REASON_STORE
        asked_at = anyio.current_time()
        outcome = await self._ports.journal.append(append, opened.deadline_at)
        self._report.committed(asked_at)
        self.waiting = pb.TurnWaiting.REASON_UNSPECIFIED
        match outcome:
            case store.Appended():
                self._acknowledge(opened, count, head)
                generation.acknowledge(steps, anyio.current_time())
                if commit is None:
                    return None
                self._wrote_end = commit
                return Ended(
                    replace(opened.turn, status=commit.status, output_end=head, result=commit)
                )
            case store.TurnEnded(turn=turn):
                return await self._ended_by_store(opened, turn)
            case store.HeadMismatch() | store.TurnUnknown():
                return await self._repair(opened)
            case store.Fenced() | store.Missing():
                return Broken(refusal(self.session_id, outcome))

    def _acknowledge(self, opened: Opened, count: int, head: Position) -> None:
        """The ledger has the first ``count`` output tokens: streams may have them too."""
        opened.resident.extend(opened.output.tokens[self.released : count])
        if self._generation is not None and (first := self._generation.take_first()) is not None:
            self._report.first_output(first)
        self._report.released(count - self.released)
        self.released, self._head, self._repairs = count, head, 0
        self._notify()

    async def _ended_by_store(self, opened: Opened, turn: Turn) -> Ending:
        """The turn ended under us: a cancel, a close, its deadline, or our own commit whose reply
        was lost. What the ledger has of our tokens is released, the rest never existed."""
        self._retract()
        if turn.output_end.length < self._head.length:
            # It ended after the store had lost tokens of it and before we could put them back.
            outcome = await self._put_back(opened)
            turn = outcome.turn if isinstance(outcome, store.TurnEnded) else turn
        output = opened.output
        count = turn.output_end.length - output.start.length
        known = self.released <= count <= len(output.tokens)
        if not known or output.digest_at(count) != turn.output_end.digest:
            return Broken(Unavailable("the turn ended elsewhere; attach again to read it"))
        self._unwritten = output.tokens[count:]
        output.end(count)
        self._acknowledge(opened, count, turn.output_end)
        return Ended(turn)

    async def _look_at_store(self, opened: Opened) -> Ending | None:
        turn = await until_answered(
            lambda: self._ports.store.get_turn(self.session_id, self.turn_id), opened.deadline_at
        )
        if turn is not None and turn.status.ended:
            return await self._ended_by_store(opened, turn)
        return None

    async def _repair(self, opened: Opened) -> Ending | None:
        """The store is not where we left it: put back what it lost, or find that it is right."""
        self._repairs += 1
        if self._repairs > MAX_REPAIRS:
            return Broken(Unavailable("the store keeps losing what it acknowledged"))
        outcome = await self._put_back(opened)
        match outcome:
            case store.Appended():
                log.warning("session %s: repaired after lost writes", self.session_id)
                self._ports.metrics.repaired()
                self._ports.residency.doubt()
                return None
            case store.TurnEnded(turn=turn):
                return await self._ended_by_store(opened, turn)
            case store.HeadMismatch():
                return None  # it moved again: the next append tells where it is
            case store.Fenced() | store.Refused() | store.Missing():
                return Broken(refusal(self.session_id, outcome))

    async def _put_back(self, opened: Opened) -> RepairOutcome:
        # The store may have ended the turn by its deadline: then, too, its client is not to lose
        # what it has received.
        give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
        return await repair(
            self._ports.store,
            opened.resident,
            self._ports.ref,
            self.epoch,
            replace(opened.turn, output_end=self._head),
            max(opened.deadline_at, give_up_at),
            token_fingerprint=self._ports.codec.token_fingerprint,
        )

    def _result(
        self, opened: Opened, status: TurnStatus, reason: FinishReason, error: str
    ) -> TurnResult:
        output = opened.output
        if reason is FinishReason.STOP and self._ports.codec.parse_tool_calls(
            output.text, self.turn_id
        ):
            reason = FinishReason.TOOL_CALLS
        usage = pb.Usage(
            input_tokens=output.start.length,
            cached_tokens=min(self.cached_tokens, output.start.length),
            output_tokens=len(output.tokens),
        )
        return TurnResult(status, reason, output.text_end, usage.SerializeToString(), error)
