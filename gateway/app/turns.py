"""One turn's stream for one client: through whatever replicas it takes, without a gap.

The loop: find the owner (cached, placed or taken), dispatch, pass bytes on; when the stream breaks,
decide whether the owner may be replaced (P10), and dispatch the same turn to the next owner from
the last position the stream reached. The client sees one TurnAccepted, then tokens without a gap,
TurnWaiting while nobody has the turn, TurnMoved where it went on.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import anyio
from sessile.v1 import replica_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.admission import Gate
from gateway.app.assignment import (
    Assignment,
    ended,
    not_open,
    unknown_turn,
)
from gateway.app.convert import epoch_to_pb, ref_to_pb
from gateway.app.directory import KnownSession
from gateway.app.frames import BadFrame, waiting
from gateway.app.ports import ReplicaLost
from gateway.app.relay import Outbox, Sink, TurnCursor
from gateway.app.request_checks import check_priority
from gateway.app.services import Services
from gateway.app.tracing import placement_attributes
from gateway.app.turn_report import TurnReport
from gateway.config import GatewayConfig
from gateway.core import failover
from gateway.core.errors import (
    DataLoss,
    InternalError,
    InvalidRequest,
    NotOwner,
    Overloaded,
    SessileError,
    Unavailable,
)
from gateway.core.failover import AskAgain, OwnerSeen, Take
from gateway.core.machines import ReplicaState
from gateway.core.placement import BYTES_PER_TOKEN, NoCandidate
from gateway.telemetry import attributes as a
from gateway.telemetry.logs import about
from statestore.ports import StoreUnavailable
from statestore.records import Owner, Session, SessionState

log = logging.getLogger(__name__)
T = TypeVar("T")

DRAIN_AFTER_FINISH_S = 1.0
"""How long the replica may take to end a stream after TurnFinished before it is closed."""

MAX_DISOWNED = 2
"""NOT_OWNER answers in a row, while the store says that it is the owner, before it is replaced."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The stream is complete."""


@dataclass(frozen=True, slots=True)
class Redirected:
    """The owner let go of the session in an orderly way: ask again who has it."""


@dataclass(frozen=True, slots=True)
class Disowned:
    """The replica says that it does not own the session under this epoch."""


@dataclass(frozen=True, slots=True)
class Busy:
    """The replica has no place now."""

    error: Overloaded


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream ended without an end."""

    refused: bool
    why: str


StreamEnd = Delivered | Redirected | Disowned | Busy | Broken


class Turns:
    """Serves RunTurn. Bounded by ``max_streams``, of which each tenant has a share, and batch turns
    have not the last ones."""

    def __init__(self, services: Services) -> None:
        self._services = services
        admission = services.config.admission
        self._streams = Gate(
            "max_streams",
            admission.max_streams,
            admission.retry_after_ms,
            admission.share_per_tenant,
            admission.batch_share,
        )

    @property
    def open_streams(self) -> int:
        return self._streams.taken

    async def run(
        self,
        tenant: str,
        request: pb.RunTurnRequest,
        time_left_s: float | None,
        sink: Sink,
    ) -> None:
        """Streams the turn into ``sink`` (serialised TurnStream messages) until it is finished.
        Raises SessileError; the turn itself may go on then and can be attached to again.
        ``time_left_s`` is the client's own limit for this call."""
        check_turn_request(request, self._services.config)
        session_id, turn_id = request.session_id, request.turn_id
        with self._streams.entered(tenant, batch=begins_as_batch(request)):
            outbox = Outbox(self._services.config.tables.relay_buffer_bytes)
            stream = _TurnStream(self._services, tenant, request, time_left_s, outbox)
            await self._services.directory.find(tenant, session_id)
            with about(session_id, turn_id), stream.report.of_turn(turn_id, outbox):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(stream.pump)
                    failure = await outbox.drain_to(sink)
                    tasks.cancel_scope.cancel()
                if failure is not None:
                    raise failure


def is_batch(request: pb.RunTurnRequest) -> bool:
    """Whether it goes behind interactive turns."""
    return request.priority == pb.TURN_PRIORITY_BATCH


def begins_as_batch(request: pb.RunTurnRequest) -> bool:
    """Whether some places are not for it: who only attaches has had a place for the turn."""
    return is_batch(request) and not request.attach_only


def check_turn_request(request: pb.RunTurnRequest, config: GatewayConfig) -> None:
    """Raises InvalidRequest for what no replica could accept."""
    limit = config.admission.max_id_chars
    if not 1 <= len(request.turn_id) <= limit:
        raise InvalidRequest(f"turn_id has 1 to {limit} characters")
    if request.timeout_ms > config.times.max_turn_s * 1000:
        raise InvalidRequest(f"timeout_ms is at most {int(config.times.max_turn_s * 1000)}")
    check_priority(request.priority)


class _TurnStream:
    """The state of one client's stream."""

    def __init__(
        self,
        services: Services,
        tenant: str,
        request: pb.RunTurnRequest,
        time_left_s: float | None,
        outbox: Outbox,
    ) -> None:
        self._s = services
        self._tenant = tenant
        self._request = request
        self._outbox = outbox
        times = services.config.times
        # A little longer than the turn: its own deadline is the ledger's business, and one that is
        # only attached to may have any.
        unset_s = times.max_turn_s if request.attach_only else times.default_turn_s
        turn_s = request.timeout_ms / 1000 or unset_s
        limit_s = turn_s + times.waiting_event_s
        if time_left_s is not None:
            limit_s = min(limit_s, time_left_s)
        self._deadline = services.clock.now() + limit_s
        self._cursor = TurnCursor(
            request.resume_from if request.HasField("resume_from") else None,
            request.accepts_redirect,
        )
        self._lost: Owner | None = None
        self._next: Assignment | None = None
        """Chosen already."""
        self._relieved = False
        """Moved away from a full owner, or tried to: once a stream, so that full replicas do not
        pass a session round."""
        self._was_accepted = False
        """The ledger has the turn as the session's active one: somebody began it before."""
        self._fruitless = 0
        self._disowned = 0
        priority = "batch" if is_batch(request) else "interactive"
        self.report = TurnReport(services, tenant, request.session_id, priority)
        self._last_heard = 0.0
        self._last_waiting = services.clock.now()

    async def pump(self) -> None:
        """Fills the outbox and closes it."""
        try:
            with self._s.quotas.streaming(self._tenant, self._request.session_id):
                await self._admitted()
                await self._deliver()
            self._outbox.close()
        except SessileError as error:
            self._outbox.close(error)
        except BadFrame as error:
            self._outbox.close(InternalError(f"a replica sent what is no turn stream: {error}"))

    async def _admitted(self) -> None:
        """Raises QuotaExceeded, MessageTooLarge. Who only attaches begins nothing."""
        request = self._request
        self._s.quotas.check_message(self._tenant, request.ByteSize())
        if not request.attach_only:
            await self._patiently(
                lambda: self._s.quotas.admit_turn(self._tenant, request.session_id, request.turn_id)
            )

    async def _deliver(self) -> None:
        while True:
            assignment = await self._assignment()
            before = self._cursor.token_messages
            end = await self._stream_from(assignment)
            progressed = self._cursor.token_messages > before
            self._fruitless = 0 if progressed else self._fruitless + 1
            match end:
                case Delivered():
                    return
                case Redirected():
                    self._cursor.moved_because = pb.TurnMoved.REASON_MIGRATION
                    self._s.directory.forget_owner(self._request.session_id, assignment.owner)
                    await self._pause(self._backoff_s())
                case Disowned():
                    await self._after_disowned(assignment)
                case Busy(error):
                    await self._after_busy(assignment, error)
                case Broken(refused, why):
                    await self._after_broken(assignment, refused, why)

    # -- finding a replica -------------------------------------------------------------------

    async def _assignment(self) -> Assignment:
        if self._next is not None:
            chosen, self._next = self._next, None
            return chosen
        known = await self._patiently(
            lambda: self._s.directory.find(self._tenant, self._request.session_id)
        )
        if known.owner is not None and known.owner != self._lost:
            assignment = self._s.assigner.current(known.owner)
            if assignment is not None:
                return assignment
        with self._s.tracing.span("place", self._request.session_id) as span:
            if self._lost is not None:
                taken = await self._retake(known, self._lost)
                if taken is not None:
                    self.report.placed(span, taken, "failover")
                    return taken
            while True:
                found = await self._patiently(self._read_and_assign)
                if isinstance(found, Assignment):
                    self.report.placed(span, found, "failover" if found.taken else "placement")
                    return found
                span.event("no candidate", placement_attributes(found))
                await self._after_no_candidate(found)

    async def _retake(self, known: KnownSession, lost: Owner) -> Assignment | None:
        seen = self._cursor.position()
        head_tokens = 0 if seen is None else seen.length
        return await self._patiently(
            lambda: self._s.assigner.retake(
                known, lost, head_tokens, self._new_tokens(), batch=self._asks_as_batch
            )
        )

    async def _read_and_assign(self) -> Assignment | NoCandidate:
        request = self._request
        session = await self._read_session()
        if session.state is not SessionState.OPEN or (
            session.owner is None and request.attach_only
        ):
            return await self._replay(session)
        # A turn that runs in it is this one, or this one is refused whoever gets it.
        batch = self._asks_as_batch and session.active_turn_id is None
        return await self._s.assigner.assign(session, self._lost, self._new_tokens(), batch=batch)

    async def _read_session(self) -> Session:
        session = await self._s.directory.read(self._tenant, self._request.session_id)
        self._was_accepted |= session.active_turn_id == self._request.turn_id
        return session

    async def _replay(self, session: Session) -> Assignment | NoCandidate:
        """A session that nobody owns: what has ended can be read by anybody."""
        turn = await self._s.store.get_turn(session.session_id, self._request.turn_id)
        if turn is None and session.state is SessionState.OPEN:
            raise self._missing_turn()
        if not ended(turn):
            if session.state is SessionState.OPEN:
                return await self._s.assigner.assign(session, self._lost, 0)
            raise not_open(session.session_id, session.state)
        reader = self._s.assigner.reader_for(session)
        return reader or NoCandidate((), overloaded=False)

    def _missing_turn(self) -> SessileError:
        """Whether the turn was ever accepted, only a client that has some of it can tell (P1)."""
        session_id, turn_id = self._request.session_id, self._request.turn_id
        heard = self._cursor.position()
        if heard is None or not heard.length:
            return unknown_turn(session_id, turn_id)
        return DataLoss(
            f"the client has output of turn {turn_id} up to {heard.length}, the ledger does not "
            "have the turn",
            metadata={"session_id": session_id, "turn_id": turn_id},
        )

    # -- one dispatch ------------------------------------------------------------------------

    async def _stream_from(self, assignment: Assignment) -> StreamEnd:
        end: StreamEnd = Broken(False, "the owner went DOWN and the stream was silent")
        failure: SessileError | BadFrame | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_silence, assignment, tasks.cancel_scope)
            try:
                with self.report.dispatching(assignment) as span:
                    end = await self._read_stream(assignment)
                    span.set({a.OUTCOME: type(end).__name__.lower()})
                    if isinstance(end, Broken):
                        span.fail(end.why, kind="broken")
            except (SessileError, BadFrame) as error:
                failure = error  # not as the group it would leave this block in
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        # It may be given up after its last event, while its end is awaited.
        return Delivered() if self._cursor.finished else end

    async def _read_stream(self, assignment: Assignment) -> StreamEnd:
        dispatch = self._dispatch(assignment)
        new_tokens = dispatch.turn.ByteSize() // BYTES_PER_TOKEN
        self._s.fleet.assume_turn(dispatch.attempt_id, assignment.replica.ref, new_tokens)
        client = self._s.replicas.at(assignment.replica.details.endpoint)
        self._last_heard = self._s.clock.now()
        cursor = self._cursor
        cursor.redirect = None
        before, silent = cursor.token_messages, True
        try:
            async with aclosing(client.dispatch_turn(dispatch, self._time_left())) as stream:
                async for message in stream:
                    forward = cursor.feed(message)
                    if forward:
                        await self._outbox.put(forward)
                    self._last_heard = self._s.clock.now()
                    if silent and cursor.token_messages > before:
                        silent = False
                        self.report.first_tokens(again=before > 0 or cursor.attached)
                    if cursor.finished:
                        self.report.end = cursor.end
                        with anyio.move_on_after(DRAIN_AFTER_FINISH_S):
                            async for _ in stream:
                                pass
                        return Delivered()
        except ReplicaLost as error:
            return Delivered() if cursor.finished else Broken(error.refused, error.message)
        except NotOwner:
            return Disowned()
        except Overloaded as error:
            return Busy(error)
        except Unavailable as error:
            return Broken(False, error.message)
        finally:
            self._s.fleet.release(dispatch.attempt_id)
        return Broken(False, "the stream ended early") if cursor.redirect is None else Redirected()

    def _dispatch(self, assignment: Assignment) -> replica_pb2.DispatchTurnRequest:
        dispatch = replica_pb2.DispatchTurnRequest(
            turn=self._request,
            epoch=epoch_to_pb(assignment.owner.epoch),
            replica=ref_to_pb(assignment.owner.replica),
            tenant=self._tenant,
            attempt_id=self._s.ids.token(),
        )
        position = self._cursor.position()
        if position is not None:
            dispatch.turn.resume_from.CopyFrom(position)
        # What the client was told of the turn holds of no other: it must not begin anew.
        if self._cursor.accepted:
            dispatch.turn.attach_only = True
        if assignment.pull_from is not None:
            dispatch.prefix.source_endpoint = assignment.pull_from.details.endpoint
            dispatch.prefix.source.CopyFrom(ref_to_pb(assignment.pull_from.ref))
        return dispatch

    async def _watch_silence(self, assignment: Assignment, scope: anyio.CancelScope) -> None:
        """Gives a stream up whose owner is DOWN and which is silent, though nothing broke: a
        process that was stopped or cut off (P10)."""
        fleet, limit_s = self._s.fleet, self._s.config.times.progress_s
        while True:
            if fleet.snapshot.state_of(assignment.owner.replica) is not ReplicaState.DOWN:
                await fleet.changed()
                continue
            silent_s = self._s.clock.now() - self._last_heard
            if silent_s >= limit_s and not self._outbox.full:
                scope.cancel()
                return
            await self._s.clock.sleep(limit_s)

    # -- after a stream that did not finish --------------------------------------------------

    async def _after_disowned(self, assignment: Assignment) -> None:
        self._s.directory.forget_owner(self._request.session_id, assignment.owner)
        session = await self._patiently(
            lambda: self._s.directory.read(self._tenant, self._request.session_id)
        )
        if session.owner != assignment.owner:
            self._disowned = 0
        else:
            # Store and replica disagree: it is another incarnation, or was fenced unnoticed.
            self._disowned += 1
            await self._patiently(self._s.fleet.refresh)
            if self._disowned >= MAX_DISOWNED:
                self._lost = assignment.owner
        await self._pause(self._backoff_s())

    async def _after_busy(self, assignment: Assignment, error: Overloaded) -> None:
        if not self._accepted and not self._relieved:
            self._relieved = True
            self._next = await self._patiently(lambda: self._relieve(assignment.owner))
            if self._next is not None:
                return
        if not self._accepted:
            raise error
        await self._wait(pb.TurnWaiting.REASON_QUEUED)
        await self._pause(max(self._backoff_s(), (error.retry_after_ms or 0) / 1000))

    async def _relieve(self, owner: Owner) -> Assignment | None:
        with self._s.tracing.span("place", self._request.session_id) as span:
            session = await self._read_session()
            found = await self._s.assigner.relieve(
                session, owner, self._new_tokens(), batch=self._asks_as_batch
            )
            if found is not None:
                self.report.placed(span, found, "relief")
            return found

    async def _after_broken(self, assignment: Assignment, refused: bool, why: str) -> None:
        replica = assignment.owner.replica
        if refused:
            self._s.fleet.report_refused(replica)
        snapshot = self._s.fleet.snapshot
        current = snapshot.get(replica)
        seen = OwnerSeen(snapshot.state_of(replica), current is None or current.stale, refused)
        decision = failover.decide(
            seen, self._request.session_id, self._earlier_fruitless(), self._s.config.failover
        )
        log.info("%s lost %s (%s): %s", self._request.session_id, replica, why, decision.why)
        self.report.lost(replica, refused, why, last_heard=self._last_heard)
        match decision:
            case Take():
                self._lost = assignment.owner
            case AskAgain():
                self._s.directory.forget_owner(self._request.session_id, assignment.owner)
        if decision.delay_ms:
            # An immediate take-over is heard of as TurnMoved.
            await self._wait(pb.TurnWaiting.REASON_FAILOVER, force=True)
            await self._pause(decision.delay_ms / 1000)

    async def _after_no_candidate(self, found: NoCandidate) -> None:
        fresh = not self._accepted and self._lost is None
        if found.overloaded and fresh:
            raise Overloaded(
                f"no replica has a place: {found}", retry_after_ms=found.retry_after_ms
            )
        await self._wait(pb.TurnWaiting.REASON_QUEUED if fresh else pb.TurnWaiting.REASON_FAILOVER)
        try:
            await self._pause(self._s.config.times.no_candidate_s)
        except Unavailable as error:
            raise Unavailable(
                f"no replica can take the session: {found}",
                retry_after_ms=error.retry_after_ms,
            ) from error

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call while the store does not answer; the client hears what is waited for."""
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await self._wait(pb.TurnWaiting.REASON_STORE)
                await self._pause(self._s.config.times.store_retry_s)

    async def _wait(self, reason: pb.TurnWaiting.Reason.ValueType, force: bool = False) -> None:
        """Tells the client, not more often than it is worth, and never into a full outbox."""
        now = self._s.clock.now()
        due = now - self._last_waiting >= self._s.config.times.waiting_event_s
        if (force or due) and not self._outbox.full:
            self._last_waiting = now
            await self._outbox.put(waiting(reason))

    async def _pause(self, seconds: float) -> None:
        """Sleeps within the deadline; past it raises Unavailable."""
        left = self._deadline - self._s.clock.now()
        if seconds >= left:
            raise Unavailable(
                "no replica could continue the turn in time",
                hint="Attach again with the same turn id; what was delivered stays valid.",
                retry_after_ms=self._s.config.admission.retry_after_ms,
            )
        if seconds > 0:
            await self._s.clock.sleep(seconds)

    def _earlier_fruitless(self) -> int:
        return max(self._fruitless - 1, 0)

    def _backoff_s(self) -> float:
        limits = self._s.config.failover
        earlier = self._earlier_fruitless()
        return failover.backoff_ms(self._request.session_id, earlier, limits) / 1000

    @property
    def _accepted(self) -> bool:
        """Whether the turn is known to be: then its client is not sent away, but waits."""
        return self._cursor.accepted or self._was_accepted

    @property
    def _asks_as_batch(self) -> bool:
        """Whether some places are not for it. An accepted turn has had its place."""
        return begins_as_batch(self._request) and not self._accepted

    def _new_tokens(self) -> int:
        return sum(len(m.content) for m in self._request.messages) // BYTES_PER_TOKEN

    def _time_left(self) -> float:
        return max(self._deadline - self._s.clock.now(), 0.001)
