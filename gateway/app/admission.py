"""Bounds on what is open at once: over one, the caller is refused early with a retry delay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.core.errors import Overloaded


class Gate:
    """Counts what is inside, and whose it is; refuses the one too many instead of queueing it.

    No tenant has more than ``share`` of the places, so none can lock the others out. Of all places
    and of a tenant's, those past ``batch_share`` are kept for interactive turns. The counters are
    as many as there are tenants inside.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        retry_after_ms: int,
        share: float = 1.0,
        batch_share: float = 1.0,
    ) -> None:
        self._name = name
        self._limit = limit
        self._tenant_limit = max(1, int(limit * share))
        self._batch_share = batch_share
        self._retry_after_ms = retry_after_ms
        self._tenants: Counter[str] = Counter()
        self.taken = 0

    @property
    def tenants(self) -> int:
        """Of which something is inside."""
        return len(self._tenants)

    @contextmanager
    def entered(self, tenant: str, *, batch: bool = False) -> Iterator[None]:
        """Raises Overloaded if ``limit`` are inside, or the tenant's share of it; a ``batch`` turn
        finds fewer places than that, but one at least."""
        self._check(self._name, self._limit, self.taken, "these", batch)
        mine = self._tenants[tenant]
        self._check(f"{self._name}_per_tenant", self._tenant_limit, mine, "one tenant's", batch)
        self.taken += 1
        self._tenants[tenant] += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    def _check(self, bound: str, limit: int, inside: int, whose: str, batch: bool) -> None:
        places = max(1, int(limit * self._batch_share)) if batch else limit
        if inside < places:
            return
        kept = f", and takes a batch turn while there are fewer than {places}" if batch else ""
        raise Overloaded(
            f"this gateway serves {limit} of {whose} at once{kept}",
            retry_after_ms=self._retry_after_ms,
            metadata={"bound": bound, "limit": str(places)},
        )
