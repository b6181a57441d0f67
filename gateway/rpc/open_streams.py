"""Streams end with the credentials that they were opened with.

A call is checked when it begins; a stream outlives that by minutes or hours. So open streams are
kept here with what their callers showed. A timer ends each when its credentials expire, and when
keys were read again all are checked anew, by one task for the whole gateway.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from anyio.lowlevel import checkpoint

from gateway.core.errors import SessileError, Unauthenticated
from gateway.rpc.auth import Authenticator
from gateway.security.access import Caller
from gateway.security.reload import CHECK_INTERVAL_S

log = logging.getLogger(__name__)

ENDED = "CREDENTIALS_ENDED"
HINT = (
    "Call again with a valid API key or token. A turn runs on meanwhile: attach to it by its id,"
    " from the position that this stream reached; nothing is lost."
)
LONGEST_S = 365 * 86_400.0
"""Who expires later than in a year has no timer: event loops take no number at all."""


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    caller: Caller
    metadata: Mapping[str, str]
    scope: anyio.CancelScope


class OpenStreams:
    """The streams that are open at this gateway. As many as its gates let in."""

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        look_period_s: float = CHECK_INTERVAL_S,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self._authenticator = authenticator
        self._look_period_s = look_period_s
        self._unix_now = unix_now
        self._open: dict[_Stream, None] = {}

    @contextmanager
    def entered(self, caller: Caller, metadata: Mapping[str, str]) -> Iterator[None]:
        """The block is one stream of the caller, who showed ``metadata``; no await between the
        caller's check and this. Cancels the block and raises Unauthenticated when what was shown
        is not accepted any more."""
        stream = _Stream(caller, metadata, anyio.CancelScope(deadline=self._deadline(caller)))
        self._open[stream] = None
        try:
            with stream.scope:
                yield
        finally:
            del self._open[stream]
        if stream.scope.cancelled_caught:
            log.info("a stream of %s ends with its credentials", caller.name)
            raise Unauthenticated(
                "the API key or token that this stream was opened with was revoked or has expired",
                reason=ENDED,
                hint=HINT,
            )

    async def run(self) -> None:
        """Until cancelled: looks whether keys changed, while there are streams."""
        seen = self._authenticator.generation
        while True:
            await anyio.sleep(self._look_period_s)
            if self._open and (generation := self._authenticator.generation) != seen:
                seen = generation
                await self._check_all()

    async def _check_all(self) -> None:
        """Streams opened meanwhile were checked against the new keys already."""
        for stream in list(self._open):
            await checkpoint()  # there may be thousands, each with a signature
            try:
                caller = await self._authenticator.caller(stream.metadata)
            except SessileError:
                stream.scope.cancel()
                continue
            if caller == stream.caller:
                stream.scope.deadline = self._deadline(caller)
            else:  # the key is another tenant's now, or has another role
                stream.scope.cancel()

    def _deadline(self, caller: Caller) -> float:
        """On the event loop's clock."""
        if caller.expires_at is None:
            return math.inf
        left_s = caller.expires_at - self._unix_now()
        return anyio.current_time() + left_s if left_s < LONGEST_S else math.inf
