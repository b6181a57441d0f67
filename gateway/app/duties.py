"""What one gateway at a time does for all: the sweep of turns past their deadline and of closed
sessions past their retention (P4), and counts of tenants' ledgers. The leader holds a fenced lease;
a second leader for a moment would be harmless, because each sweep is one atomic script."""

from __future__ import annotations

import logging

from gateway.app.ports import Clock
from gateway.app.quotas import Recount
from gateway.config import GatewayConfig
from statestore.ports import SessionStore, StoreError
from statestore.records import Lease

log = logging.getLogger(__name__)

SWEEPER = "sweeper"


class Sweeper:
    """Runs for ever in one task; call :meth:`resign` when the gateway stops."""

    def __init__(
        self, store: SessionStore, clock: Clock, holder: str, config: GatewayConfig
    ) -> None:
        self._store = store
        self._clock = clock
        self._holder = holder
        self._config = config
        self._recount = Recount(store, config)
        self._lease: Lease | None = None

    @property
    def leading(self) -> bool:
        return self._lease is not None

    async def run(self) -> None:
        while True:
            try:
                more = await self._sweep_once()
            except StoreError as error:
                self._lease = None
                more = False
                log.warning("the sweep waits for the store: %s", error)
            if not more:
                await self._clock.sleep(self._config.times.sweep_period_s)

    async def resign(self) -> None:
        """Lets another gateway lead at once. Raises StoreError."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._store.release_lease(lease)

    async def _sweep_once(self) -> bool:
        """True if a whole batch was due: more may be."""
        ttl_ms = int(self._config.times.sweep_lease_s * 1000)
        self._lease = await self._store.acquire_lease(SWEEPER, self._holder, ttl_ms)
        if self._lease is None:
            return False
        batch = self._config.tables.sweep_batch
        report = await self._store.sweep(batch)
        for session_id, turn_id in report.turns_expired:
            log.info("turn %s of %s ended: its deadline passed", turn_id, session_id)
        await self._recount.step()
        return report.examined >= batch
