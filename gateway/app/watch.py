"""Following a session's record or the fleet, by polling with a bounded period."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from sessile.v1 import fleet_pb2, session_pb2

from gateway.app.convert import replica_to_pb, session_to_pb
from gateway.app.services import Services
from gateway.core.errors import NotFound
from gateway.core.machines import ReplicaState
from statestore.ports import StoreUnavailable
from statestore.records import SessionState

DEFAULT_FLEET_INTERVAL_S = 0.5
MIN_FLEET_INTERVAL_S = 0.1


class Watches:
    """Streams of states: what changes between two looks is merged into one message."""

    def __init__(self, services: Services) -> None:
        self._directory = services.directory
        self._fleet = services.fleet
        self._clock = services.clock
        self._config = services.config

    async def session(
        self, tenant: str, session_id: str
    ) -> AsyncGenerator[session_pb2.WatchSessionResponse, None]:
        """The session now, then after each change; ends with the session's end."""
        version: int | None = None
        while True:
            try:
                session = await self._directory.read(tenant, session_id)
            except StoreUnavailable:
                session = None
            except NotFound:
                if version is None:
                    raise
                return
            if session is not None and session.version != version:
                version = session.version
                yield session_pb2.WatchSessionResponse(session=session_to_pb(session))
                if session.state is SessionState.CLOSED:
                    return
            await self._clock.sleep(self._config.times.watch_poll_s)

    def replicas(self, include_down: bool) -> list[fleet_pb2.Replica]:
        """The fleet as this gateway sees it, sorted by id."""
        return [
            replica_to_pb(replica)
            for replica in self._fleet.snapshot.replicas
            if include_down or replica.state is not ReplicaState.DOWN
        ]

    async def fleet(self, interval_ms: int) -> AsyncGenerator[fleet_pb2.WatchFleetResponse, None]:
        """The fleet now, then whenever it looks different, not more often than the interval."""
        interval_s = max(interval_ms / 1000 or DEFAULT_FLEET_INTERVAL_S, MIN_FLEET_INTERVAL_S)
        last: fleet_pb2.WatchFleetResponse | None = None
        while True:
            now = fleet_pb2.WatchFleetResponse(replicas=self.replicas(include_down=True))
            if now != last:
                last = now
                yield now
            await self._clock.sleep(interval_s)
