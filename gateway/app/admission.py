"""Bounds on what is open at once: over one, the caller is refused early with a retry delay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.core.errors import Overloaded


class Gate:
    """Counts what is inside, and whose it is; refuses the one too many instead of queueing it.

    No tenant has more than ``share`` of the places, so none can lock the others out. The counters
    are as many as there are tenants inside.
    """

    def __init__(self, name: str, limit: int, retry_after_ms: int, share: float = 1.0) -> None:
        self._name = name
        self._limit = limit
        self._tenant_limit = max(1, int(limit * share))
        self._retry_after_ms = retry_after_ms
        self._tenants: Counter[str] = Counter()
        self.taken = 0

    @property
    def tenants(self) -> int:
        """Of which something is inside."""
        return len(self._tenants)

    @contextmanager
    def entered(self, tenant: str) -> Iterator[None]:
        """Raises Overloaded if ``limit`` are inside, or the tenant's share of it."""
        if self.taken >= self._limit:
            raise self._overloaded(self._name, self._limit, "these")
        if self._tenants[tenant] >= self._tenant_limit:
            raise self._overloaded(f"{self._name}_per_tenant", self._tenant_limit, "one tenant's")
        self.taken += 1
        self._tenants[tenant] += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    def _overloaded(self, bound: str, limit: int, whose: str) -> Overloaded:
        return Overloaded(
            f"this gateway serves {limit} of {whose} at once",
            retry_after_ms=self._retry_after_ms,
            metadata={"bound": bound, "limit": str(limit)},
        )
