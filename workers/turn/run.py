"""One running turn: engine steps in, journalled tokens out, until it ends.

A run is a small state machine on one task. The engine delivers by callback; the task journals what
was delivered, one append at a time (what arrives meanwhile joins the next one), and only an
acknowledged append moves ``released``, which is all that streams can see (I2). Whatever ends the
run sets ``ending`` once, in the same step that takes the run out of the replica's table, so a
client that was told of the end can start the next turn at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import anyio
from opentelemetry import trace
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import (
    DataLoss,
    InternalError,
    NotFound,
    NotOwner,
    SessileError,
    SessionClosed,
    Unavailable,
)
from statestore import ports as store
from statestore.ports import Append, StoreError, StoreUnavailable
from statestore.records import (
    Epoch,
    FinishReason,
    Position,
    Turn,
    TurnResult,
    TurnStatus,
)
from workers.engines.port import EngineFailed, EngineOverloaded, GenerateRequest, StepOutput
from workers.journal import until_answered
from workers.turn.opening import Opened
from workers.turn.output import TurnOutput
from workers.turn.ports import TurnPorts
from workers.turn.repair import repair

log = logging.getLogger(__name__)
tracer = trace.get_tracer("sessile.worker")

MAX_REPAIRS = 8
"""Repairs of one run without an append in between; then its streams end and may be resumed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The ledger says how the turn ended."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class Broken:
    """The run stopped and the turn may go on elsewhere, or the error says why not."""

    error: SessileError


@dataclass(frozen=True, slots=True)
class Redirected:
    """The turn was handed over."""

    redirect: pb.TurnRedirect


Ending = Ended | Broken | Redirected

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
        session_id: str,
        turn_id: str,
        epoch: Epoch,
        on_end: Callable[[TurnRun], None],
    ) -> None:
        self.session_id = session_id
        self.turn_id = turn_id
        self.epoch = epoch
        self.opened: Opened | None = None
        self.released = 0
        """Output tokens that are in the ledger."""
        self.ending: Ending | None = None
        self.waiting: pb.TurnWaiting.Reason.ValueType = pb.TurnWaiting.REASON_QUEUED
        """What a stream that has nothing to send is waiting for."""
        self.cached_tokens = 0
        """Prefix tokens this attempt found in the KV cache; an estimate before its first step."""
        self._ports = ports
        self._on_end = on_end
        self._changed = anyio.Event()
        self._wake = anyio.Event()
        self._streams = 0
        self._detached_at = anyio.current_time()
        self._head = Position(0, b"")
        self._generation = ""
        self._submissions = 0
        self._submitted_at = math.inf
        self._submit_at = -math.inf
        """Not before this: the engine was full."""
        self._unacked_steps = 0
        self._parked = False
        self._failure = ""
        self._decided: tuple[FinishReason, str] | None = None
        self._repairs = 0
        self._hold: _Hold | None = None
        self._look = False
        self._told: Ending | None = None
        self._pulling = anyio.CancelScope()

    # -- what streams and the service use -------------------------------------------------------

    @property
    def output(self) -> TurnOutput:
        assert self.opened is not None, "only an opened turn has output"
        return self.opened.output

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

    @property
    def streams(self) -> int:
        return self._streams

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
        # way could still arrive. Its KV stays cached, so going on here costs one partial page.
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

    async def run(
        self,
        open_turn: Callable[[], Awaitable[Opened | Turn]],
        pull: Callable[[Opened], Awaitable[None]],
    ) -> None:
        """Opens the turn, makes its prefix resident, generates until it ends. Never raises: what
        goes wrong becomes the ending that streams report."""
        self._ports.residency.hold(self.session_id)
        with tracer.start_as_current_span("run turn") as span:
            span.set_attribute("sessile.session_id", self.session_id)
            span.set_attribute("sessile.turn_id", self.turn_id)
            span.set_attribute("sessile.replica", str(self._ports.ref))
            try:
                await self._run(open_turn, pull)
            finally:
                span.set_attribute("sessile.ending", type(self.ending).__name__)
                if self.opened is not None:
                    span.set_attribute("sessile.attempt", self.opened.turn.attempt)
                    span.set_attribute("sessile.cached_tokens", self.cached_tokens)
                    span.set_attribute("sessile.output_tokens", self.released)

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

    def _end(self, ending: Ending) -> None:
        self._retract()
        if isinstance(ending, Ended) and self.opened is not None:
            self.opened.resident.ended(ending.turn)
        elif isinstance(ending, Redirected) or (
            isinstance(ending, Broken) and isinstance(ending.error, NotOwner)
        ):
            self._ports.residency.disown(self.session_id)
        self.ending = ending
        self._on_end(self)
        self._ports.residency.rest(self.session_id)
        self._notify()

    async def _drive(
        self,
        open_turn: Callable[[], Awaitable[Opened | Turn]],
        pull: Callable[[Opened], Awaitable[None]],
    ) -> Ending:
        opened = await open_turn()
        if isinstance(opened, Turn):
            return Ended(opened)
        self._head = opened.turn.output_end
        self.released = len(opened.output.tokens)
        self.cached_tokens = self._resident_prefix(opened)
        self.opened = opened
        self._notify()
        if opened.output.reason is None:
            self.waiting = pb.TurnWaiting.REASON_KV_TRANSFER
            self._pulling.deadline = opened.deadline_at
            with self._pulling:
                await pull(opened)
            self.cached_tokens = self._resident_prefix(opened)
            self.waiting = pb.TurnWaiting.REASON_QUEUED
        while True:
            ending = await self._advance(opened)
            if ending is not None:
                return ending

    async def _advance(self, opened: Opened) -> Ending | None:
        """Does the most urgent thing, or waits for one."""
        now = anyio.current_time()
        output = opened.output
        if self._told is not None:
            return self._told
        if self._look:
            self._look = False
            return await self._look_at_store(opened)
        if self._decided is not None:
            return await self._finish(opened, *self._decided)
        if output.reason is not None or len(output.tokens) > self.released:
            return await self._journal(opened, None)
        self._decided = self._to_be_ended(opened, now)
        if self._decided is not None:
            return None
        if self._hold is not None:
            self._stand(self._hold, now)
        elif not self._generation and now >= self._submit_at:
            self._submit(opened, now)
        elif self._hung(now):
            return Broken(Unavailable("the engine makes no progress", reason="ENGINE_STALLED"))
        await self._sleep(opened)
        return None

    def _to_be_ended(self, opened: Opened, now: float) -> tuple[FinishReason, str] | None:
        """A reason to end the turn that is not in its tokens."""
        if self._failure:
            return FinishReason.ERROR, self._failure
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

    def _hung(self, now: float) -> bool:
        if not self._generation or self._parked:
            return False
        seen = max(self._submitted_at, self._ports.dispatcher.last_step_at)
        return now >= seen + self._ports.limits.progress_timeout_s

    async def _sleep(self, opened: Opened) -> None:
        limits = self._ports.limits
        until = opened.deadline_at
        if self._hold is not None:
            until = min(until, self._hold.until)
        elif self._generation and not self._parked:
            seen = max(self._submitted_at, self._ports.dispatcher.last_step_at)
            until = min(until, seen + limits.progress_timeout_s)
        else:
            until = min(until, self._submit_at)
        if not self._streams:
            until = min(until, self._detached_at + limits.detach_grace_s)
        with anyio.move_on_after(max(0.0, until - anyio.current_time())):
            await self._wake.wait()
        self._wake = anyio.Event()

    # -- the engine's side ----------------------------------------------------------------------

    def _submit(self, opened: Opened, now: float) -> None:
        """Starts (or, after a hold, restarts) the generation where the ledger ends."""
        self._submissions += 1
        turn, plan, output = opened.turn, opened.plan, opened.output
        generation = f"{self.session_id}/{self.turn_id}/{turn.attempt}/{self._submissions}"
        request = GenerateRequest(
            generation_id=generation,
            tokens=opened.resident.tokens[:],
            namespace=opened.resident.salt,
            sampling=plan.sampling,
            max_new_tokens=plan.rules.max_tokens - len(output.tokens),
            min_new_tokens=max(0, plan.rules.min_tokens - len(output.tokens)),
            stop_token_ids=plan.rules.stop_token_ids,
        )
        self._ports.dispatcher.expect(generation, self._deliver)
        try:
            self._ports.engine.submit(request)
        except EngineOverloaded as error:
            # The turn is accepted and must not be dropped: it waits here for a place.
            self._ports.dispatcher.forget(generation)
            self._submit_at = now + max(error.retry_after_ms, 1) / 1000
            return
        except ValueError as error:
            self._ports.dispatcher.forget(generation)
            self._failure = f"the engine refused the turn: {error}"
            self._wake.set()
            return
        self._generation, self._submitted_at = generation, now

    def _retract(self) -> None:
        """Takes the generation back from the engine; nothing more is delivered for it."""
        if self._generation:
            self._ports.engine.cancel(self._generation)
            self._ports.dispatcher.forget(self._generation)
        self._generation, self._parked = "", False

    def _deliver(self, step: StepOutput) -> None:
        """On the event loop, from the engine's step."""
        output = self.output
        if step.cached_tokens is not None:
            self.cached_tokens = step.cached_tokens
        output.push(step.tokens)
        self._unacked_steps += 1
        if step.error is not None:
            self._failure = step.error
        elif step.finish is not None and output.reason is None:
            self._failure = f"the engine ended early ({step.finish})"
        if self._failure or output.reason is not None:
            self._retract()
        elif self._unacked_steps >= self._ports.limits.max_unacked_steps and not self._parked:
            self._ports.engine.park(self._generation)
            self._parked = True
        self._wake.set()

    def _resident_prefix(self, opened: Opened) -> int:
        """Prefix tokens whose KV is here now; an engine computes at least the last token."""
        engine, resident = self._ports.engine, opened.resident
        pages = engine.resident_pages(resident.block_hashes(engine.info))
        return min(pages * engine.info.page_size, len(resident.tokens) - 1)

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
        output = opened.output
        head, count, steps = output.seal(), len(output.tokens), self._unacked_steps
        commit = forced
        if commit is None and output.reason is not None:
            output.end()
            commit = self._result(opened, TurnStatus.COMMITTED, output.reason, "")
        tokens = output.tokens[self.released :]
        append = Append(self.session_id, self.epoch, self.turn_id, self._head, tokens, head, commit)
        self.waiting = pb.TurnWaiting.REASON_STORE
        outcome = await self._ports.journal.append(append, opened.deadline_at)
        self.waiting = pb.TurnWaiting.REASON_UNSPECIFIED
        match outcome:
            case store.Appended():
                self._acknowledge(opened, count, head, steps)
                if commit is None:
                    return None
                return Ended(
                    replace(opened.turn, status=commit.status, output_end=head, result=commit)
                )
            case store.TurnEnded(turn=turn):
                return self._ended_by_store(opened, turn)
            case store.HeadMismatch() | store.TurnUnknown():
                return await self._repair(opened)
            case store.Fenced(data_loss=True):
                return Broken(DataLoss(f"session {self.session_id}: one epoch was granted twice"))
            case store.Fenced():
                return Broken(NotOwner(f"session {self.session_id} has another owner"))
            case store.Missing():
                return Broken(_gone(self.session_id))

    def _acknowledge(self, opened: Opened, count: int, head: Position, steps: int) -> None:
        opened.resident.extend(opened.output.tokens[self.released : count])
        self.released, self._head, self._repairs = count, head, 0
        self._unacked_steps -= steps
        if self._parked and self._unacked_steps < self._ports.limits.max_unacked_steps:
            self._ports.engine.unpark(self._generation)
            self._parked, self._submitted_at = False, anyio.current_time()
        self._notify()

    def _ended_by_store(self, opened: Opened, turn: Turn) -> Ending:
        """The turn ended under us: a cancel, a close, its deadline, or our own commit whose reply
        was lost. What the ledger has of our tokens is released, the rest never existed."""
        self._retract()
        output = opened.output
        count = turn.output_end.length - output.start.length
        known = self.released <= count <= len(output.tokens)
        if not known or output.digest_at(count) != turn.output_end.digest:
            return Broken(Unavailable("the turn ended elsewhere; attach again to read it"))
        output.end(count)
        self._acknowledge(opened, count, turn.output_end, 0)
        return Ended(turn)

    async def _look_at_store(self, opened: Opened) -> Ending | None:
        turn = await until_answered(
            lambda: self._ports.store.get_turn(self.session_id, self.turn_id), opened.deadline_at
        )
        if turn is not None and turn.status.ended:
            return self._ended_by_store(opened, turn)
        return None

    async def _repair(self, opened: Opened) -> Ending | None:
        """The store is not where we left it: put back what it lost, or find that it is right."""
        self._repairs += 1
        if self._repairs > MAX_REPAIRS:
            return Broken(Unavailable("the store keeps losing what it acknowledged"))
        outcome = await repair(
            self._ports.store,
            opened.resident,
            self._ports.ref,
            self.epoch,
            replace(opened.turn, output_end=self._head),
            opened.deadline_at,
        )
        match outcome:
            case store.Appended():
                log.warning("session %s: repaired after lost writes", self.session_id)
                return None
            case store.TurnEnded(turn=turn):
                return self._ended_by_store(opened, turn)
            case store.Fenced(data_loss=True):
                return Broken(DataLoss(f"session {self.session_id}: one epoch was granted twice"))
            case store.Fenced():
                return Broken(NotOwner(f"session {self.session_id} has another owner"))
            case store.Refused():
                return Broken(SessionClosed(f"session {self.session_id} was closed"))
            case _:
                return Broken(_gone(self.session_id))

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

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _gone(session_id: str) -> SessileError:
    return NotFound(f"session {session_id} does not exist any more", reason="SESSION_NOT_FOUND")
