"""The replica API, independent of any transport: wire messages in, wire messages out.

A replica acts only for the epoch it is told, and only as far as the store agrees. Failures are
``gateway.core.errors``; the gRPC servicer and the simulation's network are thin shells around this.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core.errors import (
    InternalError,
    InvalidRequest,
    MigrationRefused,
    NotFound,
    NotOwner,
    Overloaded,
    TurnInProgress,
    Unavailable,
)
from statestore.ports import StoreError, StoreUnavailable
from statestore.records import Epoch, Position, ReplicaRef, Session, Turn
from statestore.replica_info import ReplicaLoad
from workers.journal import until_answered
from workers.kv.transfer import KvTransfer, lease_seconds
from workers.residency import ResidentSession
from workers.transcript import read_transcript
from workers.turn.cursor import Replay, TurnView, accepted_event, stream_turn
from workers.turn.ending import Broken, Redirected
from workers.turn.opening import Opened, TurnOpening, check_input, read_output, resume_index
from workers.turn.ports import TurnPorts
from workers.turn.request import body_of, check_ids, check_turn
from workers.turn.run import TurnRun

log = logging.getLogger(__name__)

MAX_RACES = 4
"""Times a dispatch looks again because the session's run changed under it."""
RETRY_MS = 1000
"""Retry delay when the replica has as many turns as it takes."""
LOOK_PERIOD_S = 0.5
"""Between looks at what is left in a drain that ends the process."""
END_WAIT_S = 5.0
"""How long a fenced or released run is waited for; it ends at its next store answer."""


class ReplicaApp:
    """One replica's service. ``tasks`` owns the runs: they outlive the calls that start them."""

    def __init__(
        self,
        ports: TurnPorts,
        transfer: KvTransfer,
        tasks: TaskGroup,
        *,
        on_empty: Callable[[], None],
    ) -> None:
        """``on_empty`` is called once nothing is left after a drain that asked for the end."""
        self._ports = ports
        self._transfer = transfer
        self._tasks = tasks
        self._on_empty = on_empty
        self._runs: dict[str, TurnRun] = {}
        self._leaving = False
        self._closed = False

    def close(self) -> None:
        """Refuses further turns: nobody would run them."""
        self._closed = True

    # -- turns ----------------------------------------------------------------------------------

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest
    ) -> AsyncGenerator[types_pb2.TurnStream, None]:
        """Runs the turn, attaches to it, or replays it. Closing the generator leaves it running."""
        with store_errors():
            view, accepted, first = await self._view(request)
        limits = self._ports.limits
        stream = stream_turn(
            view,
            accepted,
            first,
            codec=self._ports.codec,
            max_streams=limits.max_streams,
            waiting_interval_s=limits.waiting_interval_s,
        )
        async with aclosing(stream):
            async for message in stream:
                yield message

    async def _view(
        self, request: pb.DispatchTurnRequest
    ) -> tuple[TurnView, types_pb2.TurnAccepted, int]:
        turn, epoch = request.turn, epoch_of(request.epoch)
        check_ids(turn.session_id, turn.turn_id)
        check_turn(turn)
        self._check_ref(request.replica)
        give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
        for _ in range(MAX_RACES):
            run, created = self._runs.get(turn.session_id), False
            if run is None or run.turn_id != turn.turn_id:
                session, stored = await self._read(request, give_up_at)
                if stored is not None and stored.status.ended:
                    return await self._replay(request, session, stored, give_up_at)
                if stored is None and turn.attach_only:
                    raise NotFound(f"turn {turn.turn_id} does not exist", reason="TURN_NOT_FOUND")
                salt = await self._ports.salts.of(session.tenant, give_up_at)
                run = self._runs.get(turn.session_id)
                if run is None:
                    run, created = self._start(request, epoch, session, stored, salt), True
            if run.epoch < epoch:
                # The session was taken from this replica and given back: the old run is fenced.
                run.leave(Broken(NotOwner("the session has a newer epoch")))
                await _until_ended(run)
                continue
            if run.epoch != epoch:
                raise NotOwner(f"session {turn.session_id} is owned under a newer epoch")
            if run.turn_id != turn.turn_id:
                raise TurnInProgress(
                    f"turn {run.turn_id} is running", metadata={"turn_id": run.turn_id}
                )
            view = await self._opened(run, request, created, give_up_at)
            if view is not None:
                return view
        raise Unavailable(f"session {turn.session_id} keeps changing; try again")

    def _start(
        self,
        request: pb.DispatchTurnRequest,
        epoch: Epoch,
        session: Session,
        stored: Turn | None,
        salt: bytes,
    ) -> TurnRun:
        if self._closed:
            raise Unavailable("the replica is stopping")
        info = self._ports.engine.info
        if len(self._runs) >= info.max_running + info.max_queued:
            raise Overloaded(
                f"{len(self._runs)} turns run or wait on this replica", retry_after_ms=RETRY_MS
            )
        turn = request.turn
        run = TurnRun(self._ports, turn.session_id, turn.turn_id, epoch, self._ended)
        opening = TurnOpening(self._ports, request, epoch)

        async def open_turn() -> Opened | Turn:
            return await opening.open(session, stored, salt)

        async def pull(opened: Opened) -> None:
            await self._ports.pull_prefix(opened.resident, request.prefix)

        self._runs[turn.session_id] = run
        self._tasks.start_soon(run.run, open_turn, pull, name=f"turn {turn.turn_id}")
        return run

    def _ended(self, run: TurnRun) -> None:
        if self._runs.get(run.session_id) is run:
            del self._runs[run.session_id]

    async def _opened(
        self, run: TurnRun, request: pb.DispatchTurnRequest, created: bool, give_up_at: float
    ) -> tuple[TurnView, types_pb2.TurnAccepted, int] | None:
        """The run as a view, once it is open; None if it turned out to have ended before (look in
        the ledger then)."""
        while run.opened is None and run.ending is None:
            if not await run.changed(max(0.0, give_up_at - anyio.current_time())):
                raise Unavailable("the turn is not open yet: the store does not answer")
        opened = run.opened
        if opened is None:
            if isinstance(run.ending, Broken):
                raise run.ending.error
            return None
        turn = request.turn
        check_input(turn, opened.turn, opened.resident.salt)
        first = resume_index(opened.output, run.released, _position(turn))
        accepted = accepted_event(
            opened.turn,
            opened.plan.sampling.seed,
            cached_tokens=run.cached_tokens,
            attached=not (created and opened.began),
        )
        return run, accepted, first

    async def _replay(
        self,
        request: pb.DispatchTurnRequest,
        session: Session,
        stored: Turn,
        give_up_at: float,
    ) -> tuple[TurnView, types_pb2.TurnAccepted, int]:
        """An ended turn from the ledger; needs the token fingerprint but not the session."""
        if session.token_fingerprint != self._ports.codec.token_fingerprint:
            raise NotOwner(f"session {session.session_id} needs another tokenizer or template")
        salt = await self._ports.salts.of(session.tenant, give_up_at)
        check_input(request.turn, stored, salt)
        output = await read_output(self._ports, session, stored, salt)
        first = resume_index(output, len(output.tokens), _position(request.turn))
        seed = body_of(stored.spec).params.seed
        accepted = accepted_event(stored, seed, cached_tokens=0, attached=True)
        return Replay(stored, output), accepted, first

    async def _read(
        self, request: pb.DispatchTurnRequest, give_up_at: float
    ) -> tuple[Session, Turn | None]:
        turn = request.turn
        session = await self._session(turn.session_id, request.tenant, give_up_at)
        stored = await until_answered(
            lambda: self._ports.store.get_turn(turn.session_id, turn.turn_id), give_up_at
        )
        return session, stored

    async def stop_turn(self, request: pb.StopTurnRequest) -> pb.StopTurnResponse:
        """The store has the cancel already: the run looks there and ends as it says."""
        run = self._runs.get(request.session_id)
        if run is None or run.turn_id != request.turn_id:
            return pb.StopTurnResponse(stopped=False)
        run.look()
        return pb.StopTurnResponse(stopped=True)

    # -- moves ----------------------------------------------------------------------------------

    async def hand_over(self, request: pb.HandOverRequest) -> pb.HandOverResponse:
        """Holds the running turn, if any, at a step boundary with everything journalled."""
        epoch = epoch_of(request.epoch)
        lease_s = lease_seconds(request.lease_ms)
        run = self._runs.get(request.session_id)
        if run is not None:
            if run.epoch != epoch:
                raise NotOwner(f"session {request.session_id} runs under another epoch")
            head = await run.hold(request.migration_id, lease_s)
            if head is not None:
                return pb.HandOverResponse(head=_wire(head), turn_id=run.turn_id)
            if run.ending is None:
                raise Unavailable("the turn did not come to a step boundary in time")
        with store_errors():
            give_up_at = anyio.current_time() + lease_s
            session = await self._session(request.session_id, None, give_up_at)
        if session.epoch != epoch:
            raise NotOwner(f"session {request.session_id} is owned under another epoch")
        return pb.HandOverResponse(head=_wire(session.head))

    async def abort_hand_over(self, request: pb.AbortHandOverRequest) -> pb.AbortHandOverResponse:
        """Lets a held turn go on here. Idempotent."""
        run = self._runs.get(request.session_id)
        if run is not None:
            run.resume(request.migration_id)
        return pb.AbortHandOverResponse()

    async def release_session(self, request: pb.ReleaseSessionRequest) -> pb.ReleaseSessionResponse:
        """The session is no longer ours: its run ends, its pages are freed or left as cache."""
        epoch, session_id = epoch_of(request.epoch), request.session_id
        run, resident = self._runs.get(session_id), self._ports.residency.get(session_id)
        held = max([run.epoch] if run else [], default=None)
        if resident is not None:
            held = max(resident.epoch, held) if held is not None else resident.epoch
        if held is None or held > epoch:
            return pb.ReleaseSessionResponse(released=False)
        if run is not None:
            if request.HasField("moved_to"):
                run.leave(Redirected(request.moved_to))
            else:
                run.look()
            await _until_ended(run)
        self._ports.residency.release(session_id, drop_kv=request.drop_kv)
        return pb.ReleaseSessionResponse(released=True)

    async def export_kv(self, request: pb.ExportKvRequest) -> pb.ExportKvResponse:
        """Leave for a peer to pull pages."""
        return self._transfer.export(request)

    async def import_session(self, request: pb.ImportSessionRequest) -> pb.ImportSessionResponse:
        """Pulls a session's pages up to a ledger position; says how far they are verified."""
        session_id, up_to = request.session_id, _read_position(request.up_to)
        if session_id in self._runs:
            raise MigrationRefused(f"session {session_id} runs here already")
        if not up_to.digest:
            raise InvalidRequest("up_to needs its digest: pages are verified against the ledger")
        with store_errors():
            give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
            session = await self._session(session_id, request.tenant, give_up_at)
            if up_to.length > session.head.length:
                raise MigrationRefused(f"the ledger ends at {session.head.length}")
            salt = await self._ports.salts.of(session.tenant, give_up_at)
            resident = await self._ports.residency.load(
                self._ports.store, replace(session, head=up_to), salt
            )
        pulled = await self._transfer.pull(
            resident,
            request.source_endpoint,
            ref_of(request.source),
            lease_seconds(request.lease_ms),
        )
        return pb.ImportSessionResponse(
            verified=_wire(self._transfer.verified(resident, pulled.pages)),
            pages=pulled.pages,
            bytes_copied=pulled.bytes_copied,
            detail=pulled.detail,
        )

    # -- the rest -------------------------------------------------------------------------------

    async def read_turns(self, request: pb.ReadTurnsRequest) -> pb.ReadTurnsResponse:
        """Turns as text. The session record itself is filled in by the gateway."""
        with store_errors():
            give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
            session = await self._session(request.request.session_id, request.tenant, give_up_at)
            transcript = await read_transcript(self._ports, session, request.request)
        return pb.ReadTurnsResponse(transcript=transcript)

    async def set_draining(self, request: pb.SetDrainingRequest) -> pb.SetDrainingResponse:
        """Marks this replica in the store, so that no new session is placed here."""
        with store_errors():
            give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
            await until_answered(
                lambda: self._ports.store.set_draining(self._ports.ref, request.draining),
                give_up_at,
            )
        leaving, self._leaving = self._leaving, request.draining and request.shutdown_when_empty
        if self._leaving and not leaving:
            self._tasks.start_soon(self._leave_when_empty, name="leave when empty")
        return pb.SetDrainingResponse(session_ids=self.session_ids())

    def session_ids(self) -> list[str]:
        """Sessions held here as their owner, sorted."""
        return sorted({*self._runs, *self._ports.residency.session_ids()})

    async def _leave_when_empty(self) -> None:
        """Waits until nothing is left, then asks for the end. Idle sessions that were taken by
        others leave no word here, so the store is asked about what seems left."""
        while self._leaving:
            for session_id in self.session_ids():
                if session_id not in self._runs:
                    await self._forget_if_taken(session_id)
            if not self.session_ids():
                self._on_empty()
                return
            await anyio.sleep(LOOK_PERIOD_S)

    async def _forget_if_taken(self, session_id: str) -> None:
        try:
            session = await self._ports.store.get_session(session_id)
        except StoreError as error:
            log.warning("drain: the store cannot tell who owns %s: %s", session_id, error)
            return
        owner = session.owner if session is not None else None
        if (owner is None or owner.replica != self._ports.ref) and session_id not in self._runs:
            self._ports.residency.release(session_id, drop_kv=False)

    def load(self) -> ReplicaLoad:
        """For the heartbeat."""
        load = self._ports.engine.load()
        return ReplicaLoad(
            running_turns=load.running,
            queued_turns=max(0, len(self._runs) - load.running),
            queued_prefill_tokens=load.queued_prefill_tokens,
            free_pages=load.free_pages,
            pinned_pages=load.pinned_pages,
            sessions=len(self._ports.residency),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
            leading=self._ports.residency.leading_tokens(),
        )

    async def _session(self, session_id: str, tenant: str | None, give_up_at: float) -> Session:
        session = await until_answered(
            lambda: self._ports.store.get_session(session_id), give_up_at
        )
        if session is None or (tenant is not None and session.tenant != tenant):
            raise NotFound(f"session {session_id} does not exist", reason="SESSION_NOT_FOUND")
        return session

    def _check_ref(self, ref: types_pb2.ReplicaRef) -> None:
        if ref_of(ref) != self._ports.ref:
            raise NotOwner(f"this is {self._ports.ref}, not {ref_of(ref)}")


@contextmanager
def store_errors() -> Iterator[None]:
    """Store failures as errors of the API."""
    try:
        yield
    except StoreUnavailable as error:
        raise Unavailable(f"the store does not answer: {error}") from error
    except StoreError as error:
        log.exception("store failure")
        raise InternalError(f"the store failed: {error}") from error


async def pull_by_plan(
    transfer: KvTransfer, pin_ttl_s: float, resident: ResidentSession, plan: pb.PrefixPlan
) -> None:
    """A turn's prefix as the gateway planned it; without a source it is recomputed."""
    if plan.source_endpoint:
        await transfer.pull(resident, plan.source_endpoint, ref_of(plan.source), pin_ttl_s)


async def _until_ended(run: TurnRun) -> None:
    with anyio.move_on_after(END_WAIT_S):
        while run.ending is None:
            await run.changed(END_WAIT_S)
    if run.ending is None:
        raise Unavailable("the turn that runs here is waiting for the store; try again")


def epoch_of(epoch: types_pb2.Epoch) -> Epoch:
    """Wire to record."""
    return Epoch(epoch.number, epoch.nonce)


def ref_of(ref: types_pb2.ReplicaRef) -> ReplicaRef:
    """Wire to record."""
    return ReplicaRef(ref.replica_id, ref.incarnation)


def _read_position(position: types_pb2.Position) -> Position:
    return Position(position.length, position.digest)


def _position(turn: types_pb2.RunTurnRequest) -> Position | None:
    return _read_position(turn.resume_from) if turn.HasField("resume_from") else None


def _wire(position: Position) -> types_pb2.Position:
    return types_pb2.Position(length=position.length, digest=position.digest)
