"""What the gateway's orchestration needs from outside, as ports.

Messages of the replica API are used as they are on the wire (generated classes), so that the
adapters (gRPC in production, an in-process network in the simulation) stay thin. Failures of calls
are raised as ``gateway.core.errors``; a broken connection is ``ReplicaLost``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from sessile.v1 import replica_pb2 as pb

from gateway.core.errors import Unavailable


class ReplicaLost(Unavailable):
    """The connection to a replica broke or could not be made.

    ``refused`` is True when the peer's operating system said so (connection refused or reset): the
    process is gone. False means only that nothing was heard; it may be alive (P10: then a stale
    heartbeat is needed too before its sessions are taken).
    """

    reason = "REPLICA_LOST"

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class ReplicaClient(Protocol):
    """One replica's service. Calls take a time limit in seconds (DeadlineExceeded past it)."""

    def dispatch_turn(
        self, request: pb.DispatchTurnRequest, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        """Serialised ``TurnStream`` messages as received. Closing the generator leaves the turn
        running on the replica (it is detached, not cancelled)."""
        ...

    async def stop_turn(
        self, request: pb.StopTurnRequest, timeout_s: float
    ) -> pb.StopTurnResponse: ...

    async def hand_over(
        self, request: pb.HandOverRequest, timeout_s: float
    ) -> pb.HandOverResponse: ...

    async def abort_hand_over(
        self, request: pb.AbortHandOverRequest, timeout_s: float
    ) -> pb.AbortHandOverResponse: ...

    async def import_session(
        self, request: pb.ImportSessionRequest, timeout_s: float
    ) -> pb.ImportSessionResponse: ...

    async def release_session(
        self, request: pb.ReleaseSessionRequest, timeout_s: float
    ) -> pb.ReleaseSessionResponse: ...

    async def read_turns(
        self, request: pb.ReadTurnsRequest, timeout_s: float
    ) -> pb.ReadTurnsResponse: ...

    async def set_draining(
        self, request: pb.SetDrainingRequest, timeout_s: float
    ) -> pb.SetDrainingResponse: ...


class ReplicaClients(Protocol):
    """Connections to replicas, kept and bounded by the adapter."""

    def at(self, endpoint: str) -> ReplicaClient:
        """The replica service at host:port. Makes no connection yet."""
        ...


class Clock(Protocol):
    """Monotonic seconds; wall clocks are never read in core and app."""

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class Ids(Protocol):
    """Randomness, injected."""

    def nonce(self) -> bytes:
        """8 random bytes."""
        ...

    def token(self) -> str:
        """A short random id ([a-z2-7], at least 80 bits)."""
        ...
