"""What this gateway knows of the fleet: polled records, judged liveness, its own assumptions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import anyio

from gateway.app.ports import Clock
from gateway.config import GatewayConfig
from gateway.core import liveness
from gateway.core.errors import NotFound
from gateway.core.fleet import AssumedLoad, FleetSnapshot, Replica
from gateway.core.liveness import Liveness
from gateway.core.machines import ReplicaState
from statestore.ports import SessionStore, StoreError
from statestore.records import ReplicaRecord, ReplicaRef
from statestore.replica_info import (
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    ReplicaDetails,
    ReplicaLoad,
)

log = logging.getLogger(__name__)

BEATS_TO_REPORT = 2
"""A dispatch shows in the load reported this many heartbeats later: the next beat may have been
measured just before it."""


@dataclass(frozen=True, slots=True)
class _Known:
    record: ReplicaRecord
    details: ReplicaDetails
    load: ReplicaLoad


@dataclass(frozen=True, slots=True)
class _Assumption:
    ref: ReplicaRef
    at_beat: int
    turns: int = 0
    prefill_tokens: int = 0
    sessions: int = 0
    leading: str = ""


class FleetView:
    """Polls the store; :attr:`snapshot` is immutable and always there (empty before any poll).

    Assumed load is kept per attempt and dropped by :meth:`release`; what a heartbeat may already
    report is not counted twice.
    """

    def __init__(self, store: SessionStore, clock: Clock, config: GatewayConfig) -> None:
        self._store = store
        self._clock = clock
        self._config = config
        self._liveness = Liveness(config.liveness)
        self._known: Mapping[str, _Known] = {}
        self._attempts: dict[str, _Assumption] = {}
        self._placements: dict[str, _Assumption] = {}
        self._snapshot: FleetSnapshot | None = None
        self._changed = anyio.Event()
        self._polling = anyio.Lock()
        self._polls = 0
        self._answers = True
        self._unreadable: set[ReplicaRef] = set()

    async def run(self) -> None:
        """Polls for ever. A store that does not answer is waited for: nobody ages meanwhile."""
        while True:
            try:
                await self.refresh()
            except StoreError as error:
                log.warning("the fleet cannot be read: %s", error)
                self._answers = False
            else:
                self._answers = True
            await self._clock.sleep(self._config.times.fleet_poll_s)

    async def refresh(self) -> None:
        """Reads the fleet now; calls that overlap share one read. Raises StoreError."""
        seen = self._polls
        async with self._polling:
            if self._polls != seen:
                return
            records = await self._store.fleet()
            self._polls += 1
        before = self._states()
        self._liveness = liveness.observed(self._liveness, records, self._clock.now())
        self._unreadable &= {record.ref for record in records}
        self._known = dict(filter(None, map(self._read, records)))
        self._prune()
        self._snapshot = None
        if self._states() != before:
            self._notify()

    @property
    def store_answers(self) -> bool:
        """Whether the last regular poll was answered."""
        return self._answers

    @property
    def snapshot(self) -> FleetSnapshot:
        if self._snapshot is None:
            self._snapshot = self._build()
        return self._snapshot

    def named(self, replica_id: str) -> Replica:
        """The replica of this name, whichever its incarnation. Raises NotFound."""
        replica = self.snapshot.named(replica_id)
        if replica is None:
            raise NotFound(
                f"no replica is called {replica_id!r}",
                reason="REPLICA_NOT_FOUND",
                hint="List the replicas and name one of them.",
            )
        return replica

    async def changed(self) -> None:
        """Returns when a replica appears, goes, changes its state or is told to end."""
        await self._changed.wait()

    def report_refused(self, ref: ReplicaRef) -> None:
        """A connection to this process was refused or reset: it gets nothing new until its
        heartbeat proves it alive."""
        before = self._liveness.state_of(ref)
        self._liveness = liveness.refused(self._liveness, ref)
        self._snapshot = None
        if self._liveness.state_of(ref) is not before:
            self._notify()

    def assume_turn(self, attempt_id: str, ref: ReplicaRef, prefill_tokens: int) -> None:
        """A turn was dispatched; undone by :meth:`release` with the same attempt."""
        self._attempts[attempt_id] = _Assumption(ref, self._beat(ref), 1, prefill_tokens)
        self._snapshot = None

    def release(self, attempt_id: str) -> None:
        if self._attempts.pop(attempt_id, None) is not None:
            self._snapshot = None

    def assume_session(self, session_id: str, ref: ReplicaRef, leading: str = "") -> None:
        """A session was placed; forgotten once the replica's own report includes it."""
        self._placements[session_id] = _Assumption(
            ref, self._beat(ref), sessions=1, leading=leading
        )
        self._snapshot = None

    def _beat(self, ref: ReplicaRef) -> int:
        known = self._known.get(ref.replica_id)
        return known.record.heartbeat if known is not None else 0

    def _reported(self, assumption: _Assumption) -> bool:
        known = self._known.get(assumption.ref.replica_id)
        if known is None or known.record.ref != assumption.ref:
            return True
        return known.record.heartbeat - assumption.at_beat >= BEATS_TO_REPORT

    def _prune(self) -> None:
        for session_id in [s for s, a in self._placements.items() if self._reported(a)]:
            del self._placements[session_id]

    def _read(self, record: ReplicaRecord) -> tuple[str, _Known] | None:
        known = self._known.get(record.ref.replica_id)
        same = known is not None and known.record.ref == record.ref
        try:
            details = known.details if known and same else ReplicaDetails.from_json(record.details)
            load = (
                known.load
                if known and same and known.record.load == record.load
                else ReplicaLoad.from_json(record.load)
            )
        except ValueError as error:
            if record.ref not in self._unreadable:
                self._unreadable.add(record.ref)
                log.warning(
                    "replica %s is ignored, its record is unreadable: %s", record.ref, error
                )
            return None
        if not details.speaks_with_us:
            if record.ref not in self._unreadable:
                self._unreadable.add(record.ref)
                older = details.protocol_max < PROTOCOL_OLDEST
                log.warning(
                    "replica %s is ignored: it speaks versions %d to %d of the replica API, this"
                    " gateway %d to %d; upgrade the %s",
                    record.ref,
                    details.protocol_min,
                    details.protocol_max,
                    PROTOCOL_OLDEST,
                    PROTOCOL_VERSION,
                    "replica" if older else "gateway",
                )
            return None
        return record.ref.replica_id, _Known(record, details, load)

    def _build(self) -> FleetSnapshot:
        assumed: dict[ReplicaRef, AssumedLoad] = {}
        for assumption in (*self._attempts.values(), *self._placements.values()):
            if self._reported(assumption):
                continue
            so_far = assumed.get(assumption.ref, AssumedLoad())
            leading = {assumption.leading} if assumption.leading else set()
            assumed[assumption.ref] = AssumedLoad(
                so_far.turns + assumption.turns,
                so_far.prefill_tokens + assumption.prefill_tokens,
                so_far.sessions + assumption.sessions,
                so_far.leading | leading,
            )
        return FleetSnapshot(
            tuple(
                Replica(
                    known.record.ref,
                    known.details,
                    known.load,
                    self._liveness.state_of(known.record.ref),
                    self._liveness.stale(known.record.ref),
                    assumed.get(known.record.ref, AssumedLoad()),
                )
                for _, known in sorted(self._known.items())
            )
        )

    def _states(self) -> dict[ReplicaRef, tuple[ReplicaState, bool]]:
        return {
            known.record.ref: (self._liveness.state_of(known.record.ref), known.load.leaving)
            for known in self._known.values()
        }

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
