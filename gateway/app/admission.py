"""Bounds on what is open at once: over one, the caller is refused early with a retry delay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.core.errors import Overloaded


class Gate:
    """Counts what is inside; refuses the one too many instead of queueing it."""

    def __init__(self, name: str, limit: int, retry_after_ms: int) -> None:
        self._name = name
        self._limit = limit
        self._retry_after_ms = retry_after_ms
        self.taken = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Raises Overloaded if ``limit`` are inside."""
        if self.taken >= self._limit:
            raise Overloaded(
                f"this gateway serves {self._limit} of these at once",
                retry_after_ms=self._retry_after_ms,
                metadata={"bound": self._name, "limit": str(self._limit)},
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
