"""The fleet as decisions see it: an immutable snapshot of replicas, their load and their state."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.core.machines import ReplicaState
from statestore.records import ReplicaRef
from statestore.replica_info import ReplicaDetails, ReplicaLoad


@dataclass(frozen=True, slots=True)
class AssumedLoad:
    """What this gateway sent to a replica since the load it last reported: without it, everything
    placed between two heartbeats would go to the same replica."""

    turns: int = 0
    prefill_tokens: int = 0
    sessions: int = 0
    leading: frozenset[str] = frozenset()
    """Hex digests of leading messages that the replica has just been asked to compute."""


NOTHING_ASSUMED = AssumedLoad()


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica process."""

    ref: ReplicaRef
    details: ReplicaDetails
    load: ReplicaLoad
    state: ReplicaState
    stale: bool = False
    """Its heartbeat is late, or its operating system refused a connection (also while DRAINING)."""
    assumed: AssumedLoad = NOTHING_ASSUMED

    @property
    def turns(self) -> int:
        return self.load.running_turns + self.load.queued_turns + self.assumed.turns

    @property
    def sessions(self) -> int:
        return self.load.sessions + self.assumed.sessions

    @property
    def pending_prefill_tokens(self) -> int:
        return self.load.queued_prefill_tokens + self.assumed.prefill_tokens

    def full(self, *, batch: bool) -> bool:
        """Every place to run and to queue is taken, of all or of those for batch turns."""
        return self.turns >= self.details.places(batch=batch)

    def leading_tokens(self, digest: str) -> int:
        """Tokens of these leading messages that are resident as far as it reported."""
        return self.load.leading.get(digest, 0)


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """Every known replica, sorted by id; at most one incarnation of each."""

    replicas: tuple[Replica, ...] = ()
    _by_id: dict[str, Replica] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {r.ref.replica_id: r for r in self.replicas})

    def named(self, replica_id: str) -> Replica | None:
        """The replica of this name, whichever its incarnation."""
        return self._by_id.get(replica_id)

    def get(self, ref: ReplicaRef) -> Replica | None:
        """Exactly this process; None if another incarnation has replaced it."""
        replica = self._by_id.get(ref.replica_id)
        return replica if replica is not None and replica.ref == ref else None

    def state_of(self, ref: ReplicaRef) -> ReplicaState:
        """DOWN for a process that is unknown or was replaced."""
        replica = self.get(ref)
        return ReplicaState.DOWN if replica is None else replica.state

    def models(self) -> tuple[str, ...]:
        """Models served by replicas that are not DOWN, sorted."""
        live = (r for r in self.replicas if r.state is not ReplicaState.DOWN)
        return tuple(sorted({r.details.model for r in live}))
