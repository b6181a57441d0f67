"""Getting ready for a session where the engine takes no pages from peers, because it keeps KV in a
storage of its own, or nowhere. It is given the context before it owns the session, so that it
fetches what its storage has and computes the rest while the session stands idle, not in its turn.
"""

from __future__ import annotations

import itertools
import logging

import anyio

from workers.engines.port import (
    PREFETCH,
    EngineError,
    GenerateRequest,
    Sampling,
    StepOutput,
)
from workers.kv.transfer import Pulled
from workers.residency import ResidentSession
from workers.turn.ports import TurnPorts

log = logging.getLogger(__name__)

MAX_PREFETCHES = 4
"""At once; further ones are refused, and the move tries another round or goes without."""


class Prefetches:
    """Those of one replica. Nothing here fails a move: what is not ready is computed later."""

    def __init__(self, ports: TurnPorts, timeout_s: float) -> None:
        self._ports = ports
        self._timeout_s = timeout_s
        self._numbers = itertools.count(1)
        self._running = 0

    async def prefetch(self, resident: ResidentSession, lease_s: float) -> Pulled:
        """Makes the whole pages of the session's context ready, and has the engine keep them for
        ``lease_s``. They count as verified: the engine found them by the context's own tokens, or
        computed them; ``detail`` says how many."""
        info = self._ports.engine.info
        whole = max(0, len(resident.tokens) - 1) // info.page_size
        if not whole:
            return Pulled(0, 0)
        if self._running >= MAX_PREFETCHES:
            return Pulled(0, 0, f"{MAX_PREFETCHES} sessions are prefetched already")
        self._running += 1
        amiss: str | None = None
        try:
            with anyio.fail_after(self._timeout_s):
                output = await self._generate(resident)
                amiss = output.error
        except TimeoutError:
            amiss = f"not ready within {self._timeout_s} s"
        except (EngineError, ValueError) as error:
            amiss = str(error)
        finally:
            self._running -= 1
        if amiss is not None:
            log.warning("prefetch of %s: %s", resident.session_id, amiss)
            return Pulled(0, 0, amiss)
        self._ports.engine.pin(resident.session_id, resident.block_hashes(info)[:whole], lease_s)
        found = min(whole, (output.cached_tokens or 0) // info.page_size)
        computed = f"{found} of {whole} pages were in its own storage or cache, others computed"
        return Pulled(whole, 0, "" if found == whole else computed)

    async def _generate(self, resident: ResidentSession) -> StepOutput:
        """One token that nobody gets."""
        engine, dispatcher = self._ports.engine, self._ports.dispatcher
        generation_id = f"prefetch/{resident.session_id}/{next(self._numbers)}"
        outputs: list[StepOutput] = []
        came = anyio.Event()

        def deliver(output: StepOutput) -> None:
            outputs.append(output)
            came.set()

        request = GenerateRequest(
            generation_id=generation_id,
            tokens=resident.tokens[:],
            namespace=resident.salt,
            sampling=Sampling(),
            max_new_tokens=1,
            priority=PREFETCH,
            retention_id=resident.session_id,
        )
        dispatcher.expect(generation_id, deliver)
        try:
            engine.submit(request)
            await came.wait()
        finally:
            engine.cancel(generation_id)
            dispatcher.forget(generation_id)
        return outputs[0]
