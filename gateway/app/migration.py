"""Carrying out one move: the pure machine says what to do next, this does it and reports back.

Whatever fails before the switch, the abort leaves the owner as it was: the side record goes (or
its lease ends), a held turn goes on, and the target drops what it had reserved.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import anyio
from sessile.v1 import fleet_pb2, replica_pb2, types_pb2

from gateway.app.assignment import not_open
from gateway.app.convert import epoch_to_pb, position_from_pb, position_to_pb, ref_to_pb
from gateway.app.frames import BadFrame, Kind, events
from gateway.app.services import Services
from gateway.core.errors import (
    MigrationFailed,
    MigrationRefused,
    SessileError,
)
from gateway.core.fleet import FleetSnapshot, Replica
from gateway.core.machines import MIGRATION, MigrationPhase
from gateway.core.migration import (
    Abort,
    Action,
    Began,
    Begin,
    Event,
    Failed,
    Finish,
    HeadMoved,
    Held,
    HoldTurn,
    Import,
    Imported,
    ImportFailed,
    Move,
    Switch,
    Switched,
    advance,
    move_request,
    start,
)
from gateway.core.placement import NoCandidate, place, unfit
from gateway.telemetry import attributes as a
from gateway.telemetry.logs import about
from gateway.telemetry.tracing import Spans
from statestore.ports import (
    EpochLost,
    HeadMismatch,
    Missing,
    Refused,
    SessionWritten,
    StoreError,
)
from statestore.records import Epoch, Owner, Session, SessionState

log = logging.getLogger(__name__)

CLEAN_UP_S = 5.0
"""Time for the end of a move, done or undone, shielded from the cancel of its caller."""


@dataclass(frozen=True, slots=True)
class MoveOptions:
    """``target_id`` empty: the best other replica. ``timeout_s`` 0: the configured default."""

    target_id: str = ""
    timeout_s: float = 0.0
    allow_recompute: bool = False
    cause: str = "operator"
    """Who asked for it, in traces and metrics."""


PHASES = {Begin: "begin", Import: "copy", HoldTurn: "hold", Switch: "switch"}
"""Spans of a move. Copies repeat until little is missing."""


class Migrations:
    """Moves sessions between replicas."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def migrate(self, session: Session, options: MoveOptions) -> fleet_pb2.MigrationResult:
        """Moves a placed session. Raises WrongState if it cannot be tried; a move that was tried
        and failed is a result with ``moved`` false."""
        if session.state is not SessionState.OPEN:
            raise not_open(session.session_id, session.state)
        if session.owner is None:
            raise MigrationRefused(
                "the session is on no replica: there is nothing to move",
                hint="It is placed when its next turn comes.",
            )
        snapshot = self._services.fleet.snapshot
        source = snapshot.get(session.owner.replica)
        if source is None:
            raise MigrationRefused("the session's replica is gone: its next turn is taken over")
        target = self._target(snapshot, session, source, options.target_id)
        carrier = _Carrier(self._services, session, session.owner, source, target, options)
        timeout_s = options.timeout_s or self._services.config.times.default_migration_s
        says = {
            "sessile.source": str(source.ref),
            "sessile.target": str(target.ref),
            a.CAUSE: options.cause,
        }
        span = self._services.tracing.session_span("migrate", session.session_id, says)
        with about(session.session_id), span as spans:
            result = await carrier.run(timeout_s)
            self._report(spans, options.cause, result)
            return result

    def _report(self, spans: Spans, cause: str, result: fleet_pb2.MigrationResult) -> None:
        mode = "running" if result.running_turn else "idle"
        mode += "_with_kv" if result.verified_tokens else "_without_kv"
        spans.set(
            {
                a.MODE: mode,
                a.OUTCOME: "moved" if result.moved else "failed",
                "sessile.migration.verified_tokens": result.verified_tokens,
                "sessile.migration.bytes_copied": result.bytes_copied,
                "sessile.migration.detail": result.detail,
            }
        )
        if not result.moved:
            spans.fail(result.detail, kind="migration_failed")
        self._services.metrics.moved(
            cause=cause,
            mode=mode,
            outcome="moved" if result.moved else "failed",
            duration_s=result.duration_ms / 1000,
            bytes_copied=result.bytes_copied,
        )
        if result.moved:
            self._services.metrics.epoch_taken("migration")

    def _target(
        self, snapshot: FleetSnapshot, session: Session, source: Replica, target_id: str
    ) -> Replica:
        request = move_request(session, source.ref)
        if not target_id:
            decision = place(snapshot, request, self._services.config.placement)
            if isinstance(decision, NoCandidate):
                raise MigrationRefused(f"no replica can take it: {decision}")
            return decision.replica
        target = self._services.fleet.named(target_id)
        why = unfit(target, request)
        if why is not None:
            raise MigrationRefused(f"{target.ref} cannot take it: {why}")
        return target


class _Carrier:
    """One move under way."""

    def __init__(
        self,
        services: Services,
        session: Session,
        owner: Owner,
        source: Replica,
        target: Replica,
        options: MoveOptions,
    ) -> None:
        self._store = services.store
        self._directory = services.directory
        self._tracing = services.tracing
        self._clock = services.clock
        self._times = services.config.times
        self._limits = services.config.migration
        self._nonce = services.ids.nonce()
        self._migration_id = services.ids.token()
        self._attempt_id = services.ids.token()
        self._session_id = session.session_id
        self._tenant = session.tenant
        self._epoch: Epoch = owner.epoch
        self._new_epoch: Epoch = owner.epoch
        self._source = source
        self._target = target
        self._source_client = services.replicas.at(source.details.endpoint)
        self._target_client = services.replicas.at(target.details.endpoint)
        self._import_asked = False
        self._hold_asked = False
        self._was_running = False
        self._deadline = 0.0
        self._move = Move(
            session.session_id,
            source.ref,
            target.ref,
            target.details.page_size,
            allow_recompute=options.allow_recompute,
        )

    async def run(self, timeout_s: float) -> fleet_pb2.MigrationResult:
        started = self._clock.now()
        self._deadline = started + timeout_s
        action = start(self._move)
        try:
            async with anyio.create_task_group() as self._holders:
                while not MIGRATION.final(self._move.phase):
                    with self._phase(PHASES.get(type(action), "end")) as span:
                        event = await self._do(action)
                        if isinstance(event, Failed | ImportFailed):
                            span.fail(event.why, kind=type(event).__name__)
                    self._move, action = advance(self._move, event, self._limits)
                self._holders.cancel_scope.cancel()
        finally:
            # Also when the caller was cancelled in mid-move: what is held must not stand still.
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLEAN_UP_S):
                if isinstance(action, Finish):
                    with self._phase("finish"):
                        await self._finish(action)
                else:
                    with self._phase("undo"):
                        await self._undo()
        return self._result(self._clock.now() - started)

    def _phase(self, name: str) -> AbstractContextManager[Spans]:
        return self._tracing.span(name, self._session_id)

    async def _do(self, action: Action) -> Event:
        try:
            match action:
                case Begin():
                    return await self._begin()
                case Import(up_to):
                    return await self._import(position_to_pb(up_to))
                case HoldTurn():
                    return await self._hold()
                case Switch():
                    return await self._switch(action)
                case Finish() | Abort():
                    return Failed("nothing follows the end of a move")
        except (SessileError, StoreError) as error:
            return Failed(f"{type(error).__name__}: {error}")

    async def _begin(self) -> Event:
        outcome = await self._store.begin_migration(
            self._session_id, self._epoch, self._migration_id, self._target.ref, self._lease_ms()
        )
        match outcome:
            case SessionWritten(session):
                self._was_running = session.active_turn_id is not None
                return Began(session.head, session.active_turn_id)
            case EpochLost():
                return Failed("the session changed its owner meanwhile")
            case Refused():
                return Failed("another move of the session is under way, or it is not open")
            case Missing():
                return Failed("the session is gone")

    async def _import(self, up_to: types_pb2.Position) -> Event:
        self._import_asked = True
        request = replica_pb2.ImportSessionRequest(
            session_id=self._session_id,
            migration_id=self._migration_id,
            source_endpoint=self._source.details.endpoint,
            source=ref_to_pb(self._source.ref),
            up_to=up_to,
            lease_ms=self._lease_ms(),
            tenant=self._tenant,
        )
        try:
            answer = await self._target_client.import_session(request, self._time_left())
        except SessileError as error:
            return ImportFailed(f"the copy failed: {error}")
        session = await self._store.get_session(self._session_id)
        if session is None or session.epoch != self._epoch:
            return Failed("the session changed its owner meanwhile")
        return Imported(
            answer.verified.length,
            answer.bytes_copied,
            session.head,
            session.active_turn_id,
            answer.detail,
        )

    async def _hold(self) -> Event:
        self._hold_asked = True
        asked_at = self._clock.now()
        answer = await self._ask_hold()
        if answer.turn_id:
            self._was_running = True
            self._holders.start_soon(self._keep_held, answer, asked_at)
        return Held(position_from_pb(answer.head), answer.turn_id or None)

    async def _ask_hold(self) -> replica_pb2.HandOverResponse:
        request = replica_pb2.HandOverRequest(
            session_id=self._session_id,
            epoch=epoch_to_pb(self._epoch),
            migration_id=self._migration_id,
            lease_ms=self._lease_ms(self._limits.hold_s),
        )
        return await self._source_client.hand_over(request, self._time_left())

    async def _keep_held(self, held: replica_pb2.HandOverResponse, asked_at: float) -> None:
        """Renews the hold while the move goes on: the lease is short, so that a turn whose mover
        died stands still for no longer than that."""
        answer = held
        while answer == held:
            due = asked_at + self._limits.hold_s / 2
            await self._clock.sleep(max(0.0, due - self._clock.now()))
            asked_at = self._clock.now()
            try:
                answer = await self._ask_hold()
            except SessileError as error:
                # If the turn went on, the switch will find that its head moved.
                log.info("the hold of %s was not renewed: %s", self._session_id, error)
                return

    async def _switch(self, action: Switch) -> Event:
        outcome = await self._store.switch_migration(
            self._session_id,
            self._epoch,
            self._migration_id,
            action.head,
            action.active_turn_id,
            self._nonce,
        )
        match outcome:
            case SessionWritten(session):
                self._new_epoch = session.epoch
                self._directory.remember(session)
                return Switched()
            case HeadMismatch():
                return await self._moved_on()
            case Refused(SessionState.OPEN, turn_id) if turn_id != action.active_turn_id:
                return await self._moved_on()
            case EpochLost():
                return Failed("the session changed its owner meanwhile")
            case Refused():
                return Failed("the move's lease ended, or the session is not open any more")
            case Missing():
                return Failed("the session is gone")

    async def _moved_on(self) -> Event:
        """A turn began, grew or ended between the last look and the switch."""
        session = await self._store.get_session(self._session_id)
        if session is None or session.epoch != self._epoch:
            return Failed("the session changed its owner meanwhile")
        return HeadMoved(session.head, session.active_turn_id)

    async def _finish(self, action: Finish) -> None:
        """The target owns the session: tell the source, and have a held turn go on."""
        request = replica_pb2.ReleaseSessionRequest(
            session_id=self._session_id,
            epoch=epoch_to_pb(self._epoch),
            migration_id=self._migration_id,
        )
        request.moved_to.replica.CopyFrom(ref_to_pb(self._target.ref))
        request.moved_to.endpoint = self._target.details.endpoint
        try:
            await self._source_client.release_session(request, self._times.stop_turn_s)
        except SessileError as error:
            # It is fenced already; its hold ends with its lease.
            log.info("%s could not be told of the move: %s", self._source.ref, error)
        if action.resume_turn_id is not None:
            await self._wake(action.resume_turn_id)

    async def _wake(self, turn_id: str) -> None:
        """Starts the turn on the target even if no client is attached to it now."""
        dispatch = replica_pb2.DispatchTurnRequest(
            epoch=epoch_to_pb(self._new_epoch),
            replica=ref_to_pb(self._target.ref),
            tenant=self._tenant,
            attempt_id=self._attempt_id,
        )
        dispatch.turn.session_id = self._session_id
        dispatch.turn.turn_id = turn_id
        dispatch.turn.attach_only = True
        dispatch.turn.resume_from.CopyFrom(position_to_pb(self._move.head))
        stream = self._target_client.dispatch_turn(dispatch, self._times.replica_call_s)
        try:
            async for message in stream:
                if any(kind is not Kind.WAITING for kind, _, _ in events(message)):
                    break
        except (SessileError, BadFrame) as error:
            # Whoever is attached to the turn, or attaches, dispatches it again.
            log.warning("%s did not start the moved turn %s: %s", self._target.ref, turn_id, error)
        finally:
            await stream.aclose()

    async def _undo(self) -> None:
        log.info("%s stays on %s: %s", self._session_id, self._source.ref, self._move.detail)
        try:
            await self._store.abort_migration(self._session_id, self._migration_id)
        except StoreError as error:
            log.info("the side record of %s ends with its lease: %s", self._session_id, error)
        if self._hold_asked:
            abort = replica_pb2.AbortHandOverRequest(
                session_id=self._session_id, migration_id=self._migration_id
            )
            try:
                await self._source_client.abort_hand_over(abort, self._times.stop_turn_s)
            except SessileError as error:
                log.info("the hold of %s ends with its lease: %s", self._session_id, error)
        if self._import_asked:
            release = replica_pb2.ReleaseSessionRequest(
                session_id=self._session_id,
                epoch=epoch_to_pb(self._epoch),
                migration_id=self._migration_id,
            )
            try:
                await self._target_client.release_session(release, self._times.stop_turn_s)
            except SessileError as error:
                log.info("the import of %s ends with its lease: %s", self._session_id, error)

    def _time_left(self) -> float:
        left = self._deadline - self._clock.now()
        if left <= 0:
            raise MigrationFailed("the move took longer than it was given")
        return left

    def _lease_ms(self, at_most_s: float = math.inf) -> int:
        """What is held for the move is held no longer. Never 0, which asks for a default."""
        return max(1, int(min(self._time_left(), at_most_s) * 1000))

    def _result(self, duration_s: float) -> fleet_pb2.MigrationResult:
        move = self._move
        moved = move.phase is MigrationPhase.DONE
        return fleet_pb2.MigrationResult(
            session_id=self._session_id,
            to=ref_to_pb((self._target if moved else self._source).ref),
            moved=moved,
            verified_tokens=move.verified_tokens,
            bytes_copied=move.bytes_copied,
            duration_ms=duration_s * 1000,
            rounds=move.rounds,
            running_turn=self._was_running,
            detail=move.detail,
            **{"from": ref_to_pb(self._source.ref)},
        )
