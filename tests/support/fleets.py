"""Fleets made up for tests of decisions."""

from __future__ import annotations

from dataclasses import replace

from gateway.core.fleet import AssumedLoad, FleetSnapshot, Replica
from gateway.core.machines import ReplicaState
from gateway.core.placement import Decision
from statestore.records import ReplicaRecord, ReplicaRef
from statestore.replica_info import ReplicaDetails, ReplicaLoad

MODEL = "sim-small"


def details(endpoint: str = "127.0.0.1:1", **changes: object) -> ReplicaDetails:
    base = ReplicaDetails(
        endpoint=endpoint,
        model=MODEL,
        engine="sim",
        token_fingerprint="aa" * 16,
        kv_fingerprint="bb" * 16,
        page_size=16,
        capacity_pages=4096,
        max_context_tokens=32_768,
        max_running_turns=8,
        max_queued_turns=8,
        batch_share=0.5,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def replica(
    name: str,
    *,
    state: ReplicaState = ReplicaState.READY,
    incarnation: int = 1,
    stale: bool = False,
    assumed: AssumedLoad | None = None,
    load: ReplicaLoad | None = None,
    **changes: object,
) -> Replica:
    made = details(f"{name}:1", **changes)
    return Replica(
        ReplicaRef(name, incarnation),
        made,
        load or ReplicaLoad(free_pages=made.capacity_pages, prefill_tokens_per_s=2000.0),
        state,
        stale,
        assumed or AssumedLoad(),
    )


def fleet(*replicas: Replica) -> FleetSnapshot:
    return FleetSnapshot(tuple(sorted(replicas, key=lambda r: r.ref)))


def after(snapshot: FleetSnapshot, decision: Decision, leading: str) -> FleetSnapshot:
    """The fleet once the session is there: resident, its leading messages computed."""

    def loaded(one: Replica) -> Replica:
        if one.ref != decision.replica.ref:
            return one
        tokens = {**one.load.leading, leading: 2000} if leading else one.load.leading
        return replace(one, load=replace(one.load, sessions=one.load.sessions + 1, leading=tokens))

    return FleetSnapshot(tuple(loaded(one) for one in snapshot.replicas))


def record(
    name: str = "a",
    heartbeat: int = 1,
    *,
    incarnation: int = 1,
    draining: bool = False,
    gone: bool = False,
    load: str = "",
) -> ReplicaRecord:
    return ReplicaRecord(
        ReplicaRef(name, incarnation),
        details(f"{name}:1").to_json(),
        heartbeat,
        load,
        draining,
        gone,
    )
