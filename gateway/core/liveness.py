"""Who is alive, judged from heartbeat counters by the observer's own monotonic clock.

Heartbeats are counters in the store; wall clocks are never compared. A replica ages only while the
store answers, and after a silence of the store (or of this process) everybody has one lease of
amnesty: otherwise a store that stalls for a lease would make every gateway take every session.

Pure: every function takes the state before and returns the state after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.core.machines import REPLICA, Illegal, ReplicaEvent, ReplicaState
from statestore.records import ReplicaRecord, ReplicaRef

BEATS_TO_CLEAR_REFUSAL = 2
"""A refused connection is forgotten after this many further heartbeats: one may have been written
before the process died and only be read now."""


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """Times in seconds; heartbeats are expected several times within ``suspect_after_s``."""

    suspect_after_s: float = 1.25
    down_after_s: float = 2.0
    outage_after_s: float = 1.0
    """Answers of the store further apart than this are an outage: amnesty."""

    def __post_init__(self) -> None:
        if not 0 < self.suspect_after_s < self.down_after_s:
            raise ValueError("need 0 < suspect_after_s < down_after_s")
        if not 0 < self.outage_after_s < self.down_after_s:
            raise ValueError("need 0 < outage_after_s < down_after_s")


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of one incarnation."""

    ref: ReplicaRef
    heartbeat: int
    advanced_at: float
    """Monotonic seconds when the counter was last seen to advance (or of the last amnesty)."""
    state: ReplicaState = REPLICA.initial
    refused_at_beat: int | None = None
    """Counter known when its operating system refused or reset a connection."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """Everything observed so far. ``answered_at`` is when the store last answered."""

    limits: LivenessLimits
    watches: Mapping[str, Watch] = field(default_factory=dict)
    answered_at: float | None = None

    def state_of(self, ref: ReplicaRef) -> ReplicaState:
        """DOWN for an incarnation that is unknown or replaced."""
        watch = self.watches.get(ref.replica_id)
        return watch.state if watch is not None and watch.ref == ref else ReplicaState.DOWN

    def stale(self, ref: ReplicaRef) -> bool:
        """Its heartbeat is late, or it is unknown, replaced or refused: its sessions may be taken
        if it does not answer either."""
        watch = self.watches.get(ref.replica_id)
        if watch is None or watch.ref != ref or watch.state is ReplicaState.DOWN:
            return True
        return watch.refused_at_beat is not None or _age(self, watch) > self.limits.suspect_after_s


def observed(before: Liveness, records: Iterable[ReplicaRecord], now: float) -> Liveness:
    """The store answered with these records at ``now`` (monotonic seconds)."""
    outage = (
        before.answered_at is not None and now - before.answered_at > before.limits.outage_after_s
    )
    after = Liveness(before.limits, {}, now)
    watches: dict[str, Watch] = {}
    for record in records:
        known = before.watches.get(record.ref.replica_id)
        if known is None or known.ref != record.ref:
            known = Watch(record.ref, record.heartbeat, now)
        elif outage:
            known = replace(known, advanced_at=now)
        watches[record.ref.replica_id] = _judge(after, known, record, now)
    return Liveness(before.limits, watches, now)


def refused(before: Liveness, ref: ReplicaRef) -> Liveness:
    """The peer's operating system refused or reset a connection: the process is gone, unless its
    heartbeat goes on."""
    watch = before.watches.get(ref.replica_id)
    if watch is None or watch.ref != ref:
        return before
    judged = replace(watch, refused_at_beat=watch.heartbeat)
    judged = _step(judged, ReplicaEvent.LATE)
    return replace(before, watches={**before.watches, ref.replica_id: judged})


def _judge(after: Liveness, watch: Watch, record: ReplicaRecord, now: float) -> Watch:
    if record.gone:
        return _step(watch, ReplicaEvent.GONE)
    if record.heartbeat > watch.heartbeat:
        refusal = watch.refused_at_beat
        if refusal is not None and record.heartbeat - refusal >= BEATS_TO_CLEAR_REFUSAL:
            refusal = None
        watch = replace(watch, heartbeat=record.heartbeat, advanced_at=now, refused_at_beat=refusal)
        if refusal is None:
            watch = _step(watch, ReplicaEvent.BEAT)
    age = _age(after, watch)
    if age > after.limits.down_after_s:
        return _step(watch, ReplicaEvent.EXPIRED)
    if age > after.limits.suspect_after_s:
        watch = _step(watch, ReplicaEvent.LATE)
    draining = watch.state is ReplicaState.DRAINING
    if record.draining != draining:
        watch = _step(watch, ReplicaEvent.DRAIN if record.draining else ReplicaEvent.UNDRAIN)
    return watch


def _age(state: Liveness, watch: Watch) -> float:
    """Seconds without a heartbeat while the store answered; not until now: a store that is silent
    proves nothing about replicas."""
    return 0.0 if state.answered_at is None else state.answered_at - watch.advanced_at


def _step(watch: Watch, event: ReplicaEvent) -> Watch:
    after = REPLICA.step(watch.state, event)
    return watch if isinstance(after, Illegal) else replace(watch, state=after)
