"""The replica API, independent of any transport: wire messages in, wire messages out.

A replica acts only for the epoch it is told, and only as far as the store agrees. Failures are
``gateway.core.errors``; the gRPC servicer and the simulation's network are thin shells around this.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
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
    NotOwner,
    Unavailable,
)
from gateway.telemetry.logs import about
from statestore.ports import Refused, StoreError, StoreUnavailable
from statestore.records import Epoch, Position, ReplicaRef, SessionState, UsageSum
from statestore.replica_info import MAX_ENTRIES, ReplicaLoad
from workers.journal import until_answered
from workers.kv.transfer import KvTransfer, lease_seconds
from workers.prefetch import Prefetches
from workers.residency import ResidentSession
from workers.transcript import read_transcript
from workers.turn.cursor import stream_turn
from workers.turn.ending import Redirected
from workers.turn.ports import TurnPorts, read_session, refusal
from workers.turn.request import check_ids, check_turn
from workers.turn.runs import TurnRuns

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.5
"""Between looks at what is left in a drain that ends the process."""

RECONCILE_S = 10.0
RECONCILE_SESSIONS = 128
"""So many idle sessions are looked up in the store per period, one after the other: a session that
was closed behind this replica's back is gone from it after one period, or as many as it takes to
ask for all."""
DOUBT_PERIOD_S = 0.5
"""The period after the store was seen to have lost writes: every session may have to be put back
before its turn's deadline passes in the store."""


class ReplicaApp:
    """One replica's service. ``tasks`` owns what outlives a call."""

    def __init__(
        self,
        ports: TurnPorts,
        transfer: KvTransfer,
        prefetches: Prefetches,
        tasks: TaskGroup,
        *,
        on_empty: Callable[[], None],
    ) -> None:
        """``on_empty`` is called once nothing is left after a drain that asked for the end."""
        self._ports = ports
        self._transfer = transfer
        self._prefetches = prefetches
        self._tasks = tasks
        self._on_empty = on_empty
        self._runs = TurnRuns(ports, tasks)
        self._leaving = False
        self._told_to_end = False
        self._no_target = False
        self.store_answers = True
        """Whether the last heartbeat was answered."""

    def close(self) -> None:
        """Starts no further turn."""
        self._runs.close()

    # -- turns ----------------------------------------------------------------------------------

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest
    ) -> AsyncGenerator[types_pb2.TurnStream, None]:
        """Runs the turn, attaches to it, or replays it. Closing the generator leaves it running."""
        check_ids(request.turn.session_id, request.turn.turn_id)
        check_turn(request.turn)
        if ref_of(request.replica) != self._ports.ref:
            raise NotOwner(f"this is {self._ports.ref}, not {ref_of(request.replica)}")
        with store_errors():
            found = await self._runs.find(request, epoch_of(request.epoch))
        limits = self._ports.limits
        stream = stream_turn(
            found.view,
            found.accepted,
            found.first,
            codec=self._ports.codec,
            max_streams=limits.max_streams,
            waiting_interval_s=limits.waiting_interval_s,
        )
        async with aclosing(stream):
            async for message in stream:
                yield message

    async def stop_turn(self, request: pb.StopTurnRequest) -> pb.StopTurnResponse:
        """The store has the cancel already: the run looks there and ends as it says. If none runs,
        the answer comes when what the store lost of the session is put back."""
        run = self._runs.get(request.session_id)
        if run is None:
            await self._runs.settle(request.session_id)
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
        await self._runs.settle(request.session_id)
        with store_errors():
            give_up_at = anyio.current_time() + lease_s
            session = await read_session(self._ports.store, request.session_id, None, give_up_at)
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
        epochs = [holder.epoch for holder in (run, resident) if holder is not None]
        if not epochs or max(epochs) > epoch:
            return pb.ReleaseSessionResponse(released=False)
        if run is not None:
            moved = request.HasField("moved_to")
            await self._runs.end(run, Redirected(request.moved_to) if moved else None)
        self._ports.residency.release(session_id, drop_kv=request.drop_kv)
        return pb.ReleaseSessionResponse(released=True)

    async def export_kv(self, request: pb.ExportKvRequest) -> pb.ExportKvResponse:
        """Leave for a peer to pull pages."""
        return self._transfer.export(request)

    async def import_session(self, request: pb.ImportSessionRequest) -> pb.ImportSessionResponse:
        """Gets a session's pages up to a ledger position, from their source or, where the engine
        has none that a peer could give, by itself; says how far they are verified."""
        with about(request.session_id), self._ports.tracing.span("import", request.session_id):
            return await self._import_session(request)

    async def _import_session(self, request: pb.ImportSessionRequest) -> pb.ImportSessionResponse:
        session_id, up_to = request.session_id, _read_position(request.up_to)
        if session_id in self._runs:
            raise MigrationRefused(f"session {session_id} runs here already")
        if not up_to.digest:
            raise InvalidRequest("up_to needs its digest: pages are verified against the ledger")
        with store_errors():
            give_up_at = anyio.current_time() + self._ports.limits.open_timeout_s
            session = await read_session(self._ports.store, session_id, request.tenant, give_up_at)
            if session.state is SessionState.CLOSED:
                raise refusal(session_id, Refused(session.state))
            if up_to.length > session.head.length:
                raise MigrationRefused(f"the ledger ends at {session.head.length}")
            salt = await self._ports.salts.of(session.tenant, give_up_at)
            resident = await self._ports.residency.load(
                self._ports.store, replace(session, head=up_to), salt, importing=True
            )
        lease_s = lease_seconds(request.lease_ms)
        if self._transfer.takes_pages:
            source = ref_of(request.source)
            pulled = await self._transfer.pull(resident, request.source_endpoint, source, lease_s)
        else:
            pulled = await self._prefetches.prefetch(resident, lease_s)
        if self._ports.residency.get(session_id) is None:  # closed or suspended meanwhile
            self._ports.residency.discard(resident)
            raise MigrationRefused(f"session {session_id} was released during its import")
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
            session = await read_session(
                self._ports.store, request.request.session_id, request.tenant, give_up_at
            )
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
        self._no_target = request.draining and request.no_target
        leaving, self._leaving = self._leaving, request.draining and request.shutdown_when_empty
        if self._leaving and not leaving:
            self._tasks.start_soon(self._leave_when_empty, name="leave when empty")
        return pb.SetDrainingResponse(session_ids=self.session_ids())

    async def leave(self) -> bool:
        """This process was told to end: takes no new session, asks gateways by the heartbeat to
        move those that are here, and returns True when none is left; or, if it is told that no
        other replica could take them, False when no turn runs here. Cancel it to give up."""
        self._told_to_end = True
        await until_answered(
            lambda: self._ports.store.set_draining(self._ports.ref, True), math.inf
        )
        while self.session_ids():
            for session_id in self._ports.residency.session_ids():
                await self._runs.settle(session_id)
            if self._no_target and not len(self._runs):
                log.info("no other replica could take its sessions: it does not wait for one")
                return False
            if self.session_ids():
                await anyio.sleep(LOOK_PERIOD_S)
        return True

    def session_ids(self) -> list[str]:
        """Sessions held here as their owner, sorted."""
        return sorted({*self._runs.session_ids(), *self._ports.residency.session_ids()})

    async def _leave_when_empty(self) -> None:
        """Waits until nothing is left, then asks for the end. Idle sessions that were taken by
        others, or moved here, leave no word here, so the store is asked about what seems left."""
        while self._leaving:
            for session_id in self._ports.residency.session_ids():
                await self._runs.settle(session_id)
            if not self.session_ids():
                self._on_empty()
                return
            await anyio.sleep(LOOK_PERIOD_S)

    async def reconcile(self) -> None:
        """Asks the store what became of the sessions held here, a few at a time, for ever (I9), and
        puts back what it lost of them (P1): soon, if it was seen to have lost anything."""
        in_doubt = False
        while True:
            period_s = DOUBT_PERIOD_S if in_doubt else RECONCILE_S
            in_doubt |= await self._ports.residency.doubted(period_s)
            in_doubt = await self._look_at_idle(DOUBT_PERIOD_S if in_doubt else RECONCILE_S)

    async def _look_at_idle(self, period_s: float) -> bool:
        """Asks for all idle sessions. True if it has to be done again soon: a store that does not
        answer may come back without its last writes."""
        for count, session_id in enumerate(self._ports.residency.idle_ids(), 1):
            if not await self._runs.settle(session_id):
                return True
            if count % RECONCILE_SESSIONS == 0 and await self._ports.residency.doubted(period_s):
                return True
        return False

    def store_answered(self, answered: bool) -> None:
        """The heartbeat's last word on the store."""
        self.store_answers = answered

    def doubt(self) -> None:
        """The store has lost writes: what it has of the sessions held here is looked at soon."""
        self._ports.residency.doubt()

    def load(self) -> ReplicaLoad:
        """For the heartbeat."""
        load = self._ports.engine.load()
        queued = max(0, len(self._runs) - load.running)
        sessions = self.session_ids()
        self._ports.metrics.load(
            running=load.running,
            queued=queued,
            pages={
                "free": load.free_pages,
                "used": self._ports.engine.info.capacity_pages - load.free_pages,
            },
            pinned_pages=load.pinned_pages,
            sessions=len(sessions),
            ledger_bytes=4 * self._ports.residency.owned_tokens(),
        )
        return ReplicaLoad(
            running_turns=load.running,
            queued_turns=queued,
            queued_prefill_tokens=load.queued_prefill_tokens,
            free_pages=load.free_pages,
            pinned_pages=load.pinned_pages,
            sessions=len(sessions),
            leaving=self._told_to_end,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
            leading=self._ports.residency.leading_tokens(),
            tenants=dict(self._runs.tenants().most_common(MAX_ENTRIES)),
        )

    def unreported_usage(self) -> Mapping[str, UsageSum]:
        """For the heartbeat: what was written for tenants and not reported yet."""
        return self._runs.unreported_usage()

    def usage_reported(self, sums: Mapping[str, UsageSum]) -> None:
        """The store has these sums."""
        self._runs.usage_reported(sums)


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
    """A turn's prefix as the gateway planned it; without a source it is recomputed, or found by the
    engine in a storage of its own."""
    if plan.source_endpoint and transfer.takes_pages:
        await transfer.pull(resident, plan.source_endpoint, ref_of(plan.source), pin_ttl_s)


def epoch_of(epoch: types_pb2.Epoch) -> Epoch:
    """Wire to record."""
    return Epoch(epoch.number, epoch.nonce)


def ref_of(ref: types_pb2.ReplicaRef) -> ReplicaRef:
    """Wire to record."""
    return ReplicaRef(ref.replica_id, ref.incarnation)


def _read_position(position: types_pb2.Position) -> Position:
    return Position(position.length, position.digest)


def _wire(position: Position) -> types_pb2.Position:
    return types_pb2.Position(length=position.length, digest=position.digest)
