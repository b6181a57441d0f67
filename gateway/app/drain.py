"""Emptying a replica: it takes nothing new, and what it has is moved, a bounded number at once."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
from sessile.v1 import fleet_pb2, replica_pb2

from gateway.app.migration import Migrations, MoveOptions
from gateway.app.services import Services
from gateway.core.errors import NotFound, SessileError, WrongState
from gateway.core.fleet import Replica
from gateway.core.machines import ReplicaState
from gateway.core.migration import PlannedMove, Stays, plan_drain
from statestore.ports import SessionWritten, StoreUnavailable
from statestore.records import Session

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Progress:
    with_kv: int = 0
    without_kv: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Session -> why its last try failed; tried again in the next round."""

    def keep(self, remaining: set[str]) -> None:
        """Forgets the failures of sessions that are gone by now, however they went."""
        self.failed = {name: why for name, why in self.failed.items() if name in remaining}


class Drains:
    """Empties replicas."""

    def __init__(self, services: Services, migrations: Migrations) -> None:
        self._store = services.store
        self._directory = services.directory
        self._fleet = services.fleet
        self._metrics = services.metrics
        self._migrations = migrations
        self._replicas = services.replicas
        self._clock = services.clock
        self._ids = services.ids
        self._config = services.config

    async def drain(
        self, replica_id: str, timeout_s: float, shutdown: bool
    ) -> AsyncGenerator[fleet_pb2.DrainReplicaResponse, None]:
        """Progress after each round; the last message has ``done``. Sessions still there at the
        time limit stay: they are taken over when the replica ends. A drain that is undone meanwhile
        ends in WrongState. Raises NotFound."""
        replica = self._fleet.named(replica_id)
        deadline = self._clock.now() + (timeout_s or self._config.times.default_drain_s)
        await self._announce(replica, draining=True, shutdown=shutdown)
        progress = _Progress()
        announced = False
        while True:
            state = self._state(replica)
            announced |= state is ReplicaState.DRAINING
            if announced and state is ReplicaState.READY:
                raise WrongState(
                    f"the drain of {replica.ref} was undone",
                    hint="Its other sessions stay. Drain it again if it is to be emptied.",
                )
            sessions = await self._sessions_on(replica)
            progress.keep({session.session_id for session in sessions})
            left = deadline - self._clock.now()
            done = not sessions or left <= 0
            yield fleet_pb2.DrainReplicaResponse(
                moved_with_kv=progress.with_kv,
                moved_without_kv=progress.without_kv,
                remaining=len(sessions),
                failed=len(progress.failed),
                done=done,
            )
            if done:
                return
            before = progress.with_kv + progress.without_kv
            await self._round(replica, sessions, deadline, progress)
            if progress.with_kv + progress.without_kv == before:
                left = max(deadline - self._clock.now(), 0.0)
                await self._clock.sleep(min(self._config.times.waiting_event_s, left))

    async def undo(self, replica_id: str) -> AsyncGenerator[fleet_pb2.DrainReplicaResponse, None]:
        """The replica takes sessions again, and does not end by itself. One message, with the
        sessions that are still there. Raises NotFound, and WrongState for a process that was told
        to end."""
        replica = self._fleet.named(replica_id)
        if replica.load.leaving:
            raise WrongState(
                f"{replica.ref} was told to end", hint="Start it again instead; then it is READY."
            )
        await self._announce(replica, draining=False, shutdown=False)
        left = len(await self._sessions_on(replica))
        yield fleet_pb2.DrainReplicaResponse(remaining=left, done=True)

    async def give_up(self, replica_id: str) -> None:
        """Tells a replica whose process was told to end that its sessions have nowhere to go, so
        that it does not wait for that. Raises NotFound."""
        replica = self._fleet.named(replica_id)
        await self._announce(replica, draining=True, shutdown=True, no_target=True)

    def _state(self, replica: Replica) -> ReplicaState | None:
        """As seen now; None: another process has its name, or none."""
        now = self._fleet.snapshot.named(replica.ref.replica_id)
        return now.state if now is not None and now.ref == replica.ref else None

    async def _announce(
        self, replica: Replica, *, draining: bool, shutdown: bool, no_target: bool = False
    ) -> None:
        if not await self._store.set_draining(replica.ref, draining):
            raise NotFound(f"{replica.ref} was replaced meanwhile", reason="REPLICA_NOT_FOUND")
        try:
            await self._replicas.at(replica.details.endpoint).set_draining(
                replica_pb2.SetDrainingRequest(
                    draining=draining, shutdown_when_empty=shutdown, no_target=no_target
                ),
                self._config.times.replica_call_s,
            )
        except SessileError as error:
            # The store has it: what is placed there follows it even if it does not answer.
            log.warning("%s could not be told of its drain: %s", replica.ref, error)
        with suppress(StoreUnavailable):
            await self._fleet.refresh()

    async def _sessions_on(self, replica: Replica) -> list[Session]:
        ids = await self._store.sessions_of(replica.ref, self._config.tables.drain_batch)
        found: list[Session] = []
        for session_id in ids:
            session = await self._store.get_session(session_id)
            if session is not None and session.owner and session.owner.replica == replica.ref:
                found.append(session)
        return found

    async def _round(
        self, replica: Replica, sessions: Sequence[Session], deadline: float, progress: _Progress
    ) -> None:
        by_id = {session.session_id: session for session in sessions}
        plan = plan_drain(sessions, replica.ref, self._fleet.snapshot, self._config.placement)
        limiter = anyio.CapacityLimiter(self._config.tables.drain_moves)

        async def move(planned: PlannedMove) -> None:
            async with limiter:
                left_s = deadline - self._clock.now()
                if left_s > 0:
                    await self._move(by_id[planned.session_id], planned, left_s, progress)

        async with anyio.create_task_group() as tasks:
            for planned in plan:
                match planned:
                    case PlannedMove():
                        tasks.start_soon(move, planned)
                    case Stays(session_id, why):
                        progress.failed[session_id] = why

    async def _move(
        self, session: Session, planned: PlannedMove, left_s: float, progress: _Progress
    ) -> None:
        try:
            if session.head.length == 0 and not planned.running:
                await self._unplace(session, progress)
                return
            timeout_s = min(left_s, self._config.times.default_migration_s)
            options = MoveOptions(
                planned.target.replica_id, timeout_s, allow_recompute=True, cause="drain"
            )
            result = await self._migrations.migrate(session, options)
        except (SessileError, StoreUnavailable) as error:
            progress.failed[session.session_id] = str(error)
            return
        if not result.moved:
            progress.failed[session.session_id] = result.detail
            return
        if result.verified_tokens:
            progress.with_kv += 1
        else:
            progress.without_kv += 1

    async def _unplace(self, session: Session, progress: _Progress) -> None:
        """A session without a ledger has nothing to carry: its next turn places it anew."""
        outcome = await self._store.take(session.session_id, session.epoch, None, self._ids.nonce())
        if isinstance(outcome, SessionWritten):
            self._directory.remember(outcome.session)
            self._metrics.epoch_taken("drain")
            progress.without_kv += 1
