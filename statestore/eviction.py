"""Whether a server has come to evict keys since this process connected: an operator changed its
policy, or another one was promoted.

It is asked with a pipeline that goes there anyway, so nothing has to be connected or waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from statestore.ports import StoreMisconfigured
from statestore.redis_failures import check_policy

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 10.0
"""Between looks at one server, and between the log's lines about it."""


class EvictionWatch:
    """Of one client. Servers that are not called any more are few, and forgotten with it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._looked_at: dict[str, float] = {}

    def add(self, pipeline: Any, server: str = "", **options: Any) -> bool:
        """Has the pipeline ask as well, if it is time to; whether it does."""
        now = self._now()
        if now - self._looked_at.setdefault(server, now) < LOOK_INTERVAL_S:
            return False
        self._looked_at[server] = now
        pipeline.execute_command("INFO", "memory", **options)
        return True

    def look(self, replies: Sequence[Any], server: str = "") -> None:
        """Says in the log what is wrong, by what the server answered."""
        for info in replies:
            if isinstance(info, dict):
                try:
                    check_policy(info)
                except StoreMisconfigured as error:
                    log.error("sessions may be lost: %s%s", error, server and f" (at {server})")
