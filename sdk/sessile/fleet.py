"""The operator's side: replicas, drains, moves.

for replica in await client.fleet.replicas():
    print(replica.ref, replica.state, replica.load.sessions)
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from sessile.records import ReplicaRef, enum_from_pb
from sessile.transport import Transport
from sessile.v1 import fleet_pb2 as pb


class ReplicaState(enum.StrEnum):
    """Life of a replica process, as the gateway that answers sees it."""

    PENDING = "pending"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DOWN = "down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """As last reported by the replica."""

    running_turns: int
    max_running_turns: int
    queued_turns: int
    max_queued_turns: int
    queued_prefill_tokens: int
    free_pages: int
    pinned_pages: int
    sessions: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica. Sizes in pages of ``page_size`` tokens."""

    ref: ReplicaRef
    model: str
    endpoint: str
    state: ReplicaState
    engine: str
    page_size: int
    capacity_pages: int
    max_context_tokens: int
    load: ReplicaLoad
    site: str
    hardware: str

    @classmethod
    def from_pb(cls, replica: pb.Replica) -> Replica:
        load = replica.load
        return cls(
            ref=ReplicaRef.from_pb(replica.ref),
            model=replica.model,
            endpoint=replica.endpoint,
            state=enum_from_pb(ReplicaState, pb.ReplicaState.Name, replica.state, "REPLICA_STATE_"),
            engine=replica.engine,
            page_size=replica.page_size,
            capacity_pages=replica.capacity_pages,
            max_context_tokens=replica.max_context_tokens,
            load=ReplicaLoad(
                running_turns=load.running_turns,
                max_running_turns=load.max_running_turns,
                queued_turns=load.queued_turns,
                max_queued_turns=load.max_queued_turns,
                queued_prefill_tokens=load.queued_prefill_tokens,
                free_pages=load.free_pages,
                pinned_pages=load.pinned_pages,
                sessions=load.sessions,
                prefill_tokens_per_s=load.prefill_tokens_per_s,
                decode_tokens_per_s=load.decode_tokens_per_s,
            ),
            site=replica.site,
            hardware=replica.hardware,
        )


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """Sessions of a draining replica; the last one has ``done``. ``failed`` are those among
    ``remaining`` whose last try to move failed."""

    moved_with_kv: int
    moved_without_kv: int
    remaining: int
    failed: int
    done: bool


@dataclass(frozen=True, slots=True)
class Migration:
    """How a session's move ended. ``detail`` says why, if it did not move or moved without KV."""

    session_id: str
    source: ReplicaRef
    target: ReplicaRef
    moved: bool
    verified_tokens: int
    bytes_copied: int
    duration_ms: float
    rounds: int
    running_turn: bool
    detail: str


class Fleet:
    """What operators use; ``client.fleet``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def replicas(self, *, include_down: bool = False) -> list[Replica]:
        """Sorted by id."""
        response = await self._transport.call(
            lambda gateway: gateway.fleet.ListReplicas,
            lambda: pb.ListReplicasRequest(include_down=include_down),
        )
        return [Replica.from_pb(replica) for replica in response.replicas]

    async def watch(self, *, interval_s: float = 0.5) -> AsyncGenerator[list[Replica], None]:
        """The fleet now and after changes, at most once in ``interval_s``, until the generator is
        closed. Connects again as often as the retry policy allows."""
        states = self._transport.follow(
            lambda gateway: gateway.fleet.WatchFleet,
            lambda _: pb.WatchFleetRequest(interval_ms=round(interval_s * 1000)),
        )
        async with aclosing(states):
            async for response in states:
                yield [Replica.from_pb(replica) for replica in response.replicas]

    async def drain(
        self, replica_id: str, *, timeout_s: float = 120.0, shutdown: bool = False
    ) -> AsyncGenerator[DrainProgress, None]:
        """Empties a replica and reports progress; with ``shutdown`` its process ends when it is
        empty. Goes on through another gateway if one is lost; the moves are counted anew then."""
        spare_s = self._transport.timeout_s
        steps = self._transport.follow(
            lambda gateway: gateway.fleet.DrainReplica,
            lambda left_s: pb.DrainReplicaRequest(
                replica_id=replica_id,
                timeout_ms=max(1, round((left_s - spare_s) * 1000)),
                shutdown=shutdown,
            ),
            timeout_s=timeout_s + spare_s,
        )
        async with aclosing(steps):
            async for response in steps:
                yield DrainProgress(
                    moved_with_kv=response.moved_with_kv,
                    moved_without_kv=response.moved_without_kv,
                    remaining=response.remaining,
                    failed=response.failed,
                    done=response.done,
                )

    async def undrain(self, replica_id: str) -> DrainProgress:
        """Undoes a drain: the replica takes new sessions again. ``remaining`` is what it still
        has."""
        steps = self._transport.follow(
            lambda gateway: gateway.fleet.DrainReplica,
            lambda _: pb.DrainReplicaRequest(replica_id=replica_id, undo=True),
            timeout_s=self._transport.timeout_s,
        )
        async with aclosing(steps):
            async for response in steps:
                return DrainProgress(0, 0, response.remaining, 0, response.done)
        return DrainProgress(0, 0, 0, 0, done=False)

    async def migrate(
        self,
        session_id: str,
        *,
        target: str = "",
        timeout_s: float = 30.0,
        allow_recompute: bool = False,
    ) -> Migration:
        """Moves a session with its KV to ``target`` (default: the best other replica). Without
        ``allow_recompute`` a failed copy leaves it where it is. Repeated only if it was refused
        for overload."""
        response = await self._transport.call(
            lambda gateway: gateway.fleet.MigrateSession,
            lambda: pb.MigrateSessionRequest(
                session_id=session_id,
                target_replica_id=target,
                timeout_ms=round(timeout_s * 1000),
                allow_recompute=allow_recompute,
            ),
            timeout_s=timeout_s + self._transport.timeout_s,
            idempotent=False,
        )
        result = response.result
        return Migration(
            session_id=result.session_id,
            source=ReplicaRef.from_pb(getattr(result, "from")),
            target=ReplicaRef.from_pb(result.to),
            moved=result.moved,
            verified_tokens=result.verified_tokens,
            bytes_copied=result.bytes_copied,
            duration_ms=result.duration_ms,
            rounds=result.rounds,
            running_turn=result.running_turn,
            detail=result.detail,
        )
