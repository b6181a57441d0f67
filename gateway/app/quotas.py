"""Tenants' quotas over all gateways: where what is used is known from, and who counts it.

Nothing is counted up and down, so nothing leaks when a turn, a gateway or a replica dies. Running
turns are those that replicas report with their heartbeats, or those a gateway streams itself if
they are more. Tokens are the sums that replicas report (``statestore/usage.py``), which the gateway
that sweeps sets right by counting the sessions now and then.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.app.fleet_view import FleetView
from gateway.app.ports import Clock
from gateway.config import GatewayConfig
from gateway.core.errors import MessageTooLarge, QuotaExceeded
from gateway.core.machines import ReplicaState
from gateway.core.quotas import Exceeded, TenantQuota, quota_of, session_exceeds, turn_exceeds
from statestore.ports import SessionStore
from statestore.records import TenantUsage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seen:
    """A tenant's usage as last read."""

    usage: TenantUsage
    at: float
    asked_for_count_at: float | None = None


class Quotas:
    """Refuses what is over a tenant's quota. The tables are bounded by the tenants that have
    streams here, and by ``tables.usages``."""

    def __init__(
        self, store: SessionStore, fleet: FleetView, clock: Clock, config: GatewayConfig
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._config = config
        self._here: dict[str, Counter[str]] = {}
        """Tenant -> its sessions with streams here."""
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def of(self, tenant: str) -> TenantQuota:
        return quota_of(self._config.quotas, tenant)

    def check_message(self, tenant: str, size: int) -> None:
        """Raises MessageTooLarge."""
        most = self.of(tenant).message_bytes
        if most and size > most:
            raise MessageTooLarge(
                f"the request has {size} bytes, the tenant's quota message_bytes is {most}",
                metadata={"quota": "message_bytes", "limit": str(most), "used": str(size)},
            )

    def session_refused(self, tenant: str) -> QuotaExceeded:
        """The store found as many sessions as the tenant may have."""
        return _refused(session_exceeds(self.of(tenant)))

    @contextmanager
    def streaming(self, tenant: str, session_id: str) -> Iterator[None]:
        """A stream of one of the tenant's sessions is open here."""
        sessions = self._here.setdefault(tenant, Counter())
        sessions[session_id] += 1
        try:
            yield
        finally:
            sessions[session_id] -= 1
            if not sessions[session_id]:
                del sessions[session_id]
            if not sessions and self._here.get(tenant) is sessions:
                del self._here[tenant]

    async def admit_turn(self, tenant: str, session_id: str, turn_id: str) -> None:
        """Raises QuotaExceeded for a turn that is one too many, unless it was begun before: who
        attaches to it, or has it repeated, is served. Raises StoreError."""
        quota = self.of(tenant)
        usage = await self._usage(tenant, quota) if quota.counts_tokens else None
        exceeded = turn_exceeds(quota, self._running_beside(tenant, session_id), usage)
        if exceeded is None or await self._store.get_turn(session_id, turn_id) is not None:
            return
        if exceeded.quota == "ledger_tokens":
            await self._ask_for_count(tenant)
        raise _refused(exceeded)

    def _running_beside(self, tenant: str, session_id: str) -> int:
        """The tenant's turns without that of this session: as replicas report, and as streams here
        are; what is in neither yet was let in by other gateways within the last moment."""
        reported = sum(
            replica.load.tenants.get(tenant, 0)
            for replica in self._fleet.snapshot.replicas
            if replica.state is not ReplicaState.DOWN
        )
        here = self._here.get(tenant, Counter())
        return max(reported, len(here) - (session_id in here))

    async def _usage(self, tenant: str, quota: TenantQuota) -> TenantUsage:
        seen, now = self._seen.get(tenant), self._clock.now()
        if seen is None:
            await self._store.note_usage(tenant)
        elif now - seen.at < self._config.times.usage_poll_s:
            return seen.usage
        else:
            seen.at = now  # others go by what was seen before, until it is read anew
        usage = await self._store.read_usage(tenant, quota.tokens_per_minute)
        asked = None if seen is None else seen.asked_for_count_at
        self._seen[tenant] = _Seen(usage, now, asked)
        self._seen.move_to_end(tenant)
        while len(self._seen) > self._config.tables.usages:
            self._seen.popitem(last=False)
        return usage

    async def _ask_for_count(self, tenant: str) -> None:
        """Perhaps sessions were purged since the last count."""
        seen, now, times = self._seen.get(tenant), self._clock.now(), self._config.times
        if seen is None:
            return
        if seen.asked_for_count_at is None or now - seen.asked_for_count_at >= times.recount_ask_s:
            seen.asked_for_count_at = now
            await self._store.note_usage(tenant, int(times.recount_s * 1000))


@dataclass(slots=True)
class _Count:
    tenant: str
    told: int
    tokens: int = 0
    cursor: str = ""


class Recount:
    """Counts tenants' ledgers, a bounded number of sessions at each step. One gateway does it."""

    def __init__(self, store: SessionStore, config: GatewayConfig) -> None:
        self._store = store
        self._batch = config.tables.recount_batch
        self._min_age_ms = int(config.times.recount_s * 1000)
        self._needed = any(quota.ledger_tokens for quota in config.quotas.values())
        self._count: _Count | None = None

    async def step(self) -> None:
        """Goes on with a count, or begins one that is due. Raises StoreError; the count is then
        given up, and made when it is due again."""
        if not self._needed:
            return
        count, self._count = self._count, None
        if count is None:
            tenant = await self._store.uncounted_tenant(self._min_age_ms)
            if tenant is None:
                return
            count = _Count(tenant, (await self._store.read_usage(tenant, 0)).ledger_tokens)
        tokens, count.cursor = await self._store.count_ledgers(
            count.tenant, count.cursor, self._batch
        )
        count.tokens += tokens
        if count.cursor:
            self._count = count
            return
        await self._store.settle_usage(count.tenant, count.told, count.tokens)
        if count.tokens != count.told:
            log.info(
                "%s: %d ledger tokens told, %d counted", count.tenant, count.told, count.tokens
            )


def _refused(exceeded: Exceeded) -> QuotaExceeded:
    return QuotaExceeded(
        str(exceeded),
        hint=exceeded.hint,
        retry_after_ms=exceeded.retry_after_ms,
        metadata={
            "quota": exceeded.quota,
            "limit": str(exceeded.limit),
            "used": str(exceeded.used),
        },
    )
