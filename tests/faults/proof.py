"""That something has come about, or that it cannot be shown to have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
from redis.exceptions import RedisError


class Unproven(Exception):
    """The phase was not reached, or cannot be shown to have been."""


async def until(condition: Callable[[], Awaitable[bool]], what: str, limit_s: float = 30.0) -> None:
    """Polls for something that has no event; Unproven if it does not come."""
    with anyio.move_on_after(limit_s):
        while True:
            with suppress(OSError, RedisError):
                if await condition():
                    return
            await anyio.sleep(0.01)
    raise Unproven(f"{what}: not within {limit_s} s")
