"""What one tenant may use, and when a turn is one too many. Pure: what is known comes in.

Tokens are judged when a turn begins, by what was written until a moment ago; a turn that runs is
never cut off for a quota. So the tokens of the turns that run at once may go past it, and are
waited for: over a long time no tenant gets more than its quota.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from statestore.records import TenantUsage

EVERY_TENANT = "*"
"""Names the quota of tenants that have none of their own."""
MAX_WAIT_MS = 3_600_000
"""No longer retry delay is told."""
FREED_WAIT_MS = 5_000
"""Retry delay where something has to be closed first."""
RUNNING_WAIT_MS = 1_000
"""Retry delay where a turn has to end first."""
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """What one tenant may use over all gateways; 0: any amount."""

    sessions: int = 100_000
    """Closed ones count until they are purged."""
    running_turns: int = 1024
    """That run or wait at once."""
    ledger_tokens: int = 0
    """In all its ledgers, 4 bytes each in the store; of closed sessions until they are purged."""
    tokens_per_minute: int = 0
    """Input and output that turns write; what a minute leaves over may be used in the next one."""
    message_bytes: int = 0
    """Of one request to open a session or run a turn; others have no content to speak of."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"a quota's {field.name} must not be negative")

    @property
    def counts_tokens(self) -> bool:
        return bool(self.ledger_tokens or self.tokens_per_minute)


@dataclass(frozen=True, slots=True)
class Exceeded:
    """One turn, or session, too many."""

    quota: str
    limit: int
    used: int
    retry_after_ms: int
    hint: str

    def __str__(self) -> str:
        return f"the tenant's quota {self.quota} is {self.limit}, and {self.used} are in use"


def check_names(quotas: Mapping[str, TenantQuota]) -> None:
    """Raises ValueError for a quota that no tenant could have."""
    for name in quotas:
        if name != EVERY_TENANT and _TENANT.fullmatch(name) is None:
            raise ValueError(
                f"quotas: {name!r} is no tenant; use its name, or {EVERY_TENANT!r} for every other"
            )


def quota_of(quotas: Mapping[str, TenantQuota], tenant: str) -> TenantQuota:
    """Its own, or that of every tenant."""
    return quotas.get(tenant) or quotas.get(EVERY_TENANT) or TenantQuota()


def turn_exceeds(quota: TenantQuota, running: int, usage: TenantUsage | None) -> Exceeded | None:
    """Why another turn may not begin now; None if it may. ``running`` are the tenant's others;
    ``usage`` is None if nothing of it is bounded."""
    if quota.running_turns and running >= quota.running_turns:
        return Exceeded(
            "running_turns",
            quota.running_turns,
            running,
            RUNNING_WAIT_MS,
            "Wait until a turn has ended, or cancel one.",
        )
    if usage is None:
        return None
    if quota.ledger_tokens and usage.ledger_tokens >= quota.ledger_tokens:
        return Exceeded(
            "ledger_tokens",
            quota.ledger_tokens,
            usage.ledger_tokens,
            FREED_WAIT_MS,
            "Close sessions with purge; their tokens are counted again within seconds.",
        )
    if quota.tokens_per_minute and usage.minute_tokens <= 0:
        missing = 1 - usage.minute_tokens
        wait_ms = -(-missing * 60_000 // quota.tokens_per_minute)
        return Exceeded(
            "tokens_per_minute",
            quota.tokens_per_minute,
            quota.tokens_per_minute - usage.minute_tokens,
            min(wait_ms, MAX_WAIT_MS),
            "Try again after the retry delay: until then earlier turns' tokens are paid for.",
        )
    return None


def session_exceeds(quota: TenantQuota) -> Exceeded:
    """The refusal of a session that the store found to be one too many."""
    return Exceeded(
        "sessions",
        quota.sessions,
        quota.sessions,
        FREED_WAIT_MS,
        "Close sessions that are not needed; they count until they are purged.",
    )
