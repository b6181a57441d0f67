"""What the engines before an sglang have in common, wherever it runs: generations as requests, and
sessions whose cached prefixes it is to keep for a while."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from workers.engines.port import EngineFailed, EngineLoad, GenerateRequest
from workers.engines.sglang_requests.generations import Generations

TAG_TTL_S = 3600.0
"""For what a turn leaves whose session is pinned by nobody afterwards."""
MAX_TAGGED = 1 << 16
"""Sessions; over it the one that was tagged first is closed."""


class RequestEngine(ABC):
    """A subclass sets :attr:`_generations` in ``start``, and calls :meth:`_end` in ``aclose``."""

    _generations: Generations
    _on_failure: Callable[[EngineFailed], None]

    def __init__(self) -> None:
        self._failure: EngineFailed | None = None
        self._tagged: dict[str, asyncio.TimerHandle] = {}
        """Sessions whose cached prefixes sglang is to keep -> until when."""

    @abstractmethod
    def _close_session(self, session_id: str) -> None:
        """Tells sglang that what the session's requests left may go first from now on. It keeps an
        entry for every session that it is not told of."""

    def submit(self, request: GenerateRequest) -> None:
        self._generations.submit(request)
        if request.retention_id and request.retention_id not in self._tagged:
            self._tag(request.retention_id, TAG_TTL_S)

    def park(self, generation_id: str) -> None:
        self._generations.park(generation_id)

    def unpark(self, generation_id: str) -> None:
        self._generations.unpark(generation_id)

    def cancel(self, generation_id: str) -> None:
        self._generations.cancel(generation_id)

    def _fail(self, error: EngineFailed) -> None:
        """Every generation is lost; told once."""
        if self._failure is None:
            self._failure = error
            generations = getattr(self, "_generations", None)
            if generations is not None and generations.on_step is not None:
                generations.failure, generations.on_step = error, None
                self._on_failure(error)

    def _end(self) -> None:
        """Nothing is delivered any more, and no session is closed later."""
        for timer in self._tagged.values():
            timer.cancel()
        self._tagged.clear()
        if hasattr(self, "_generations"):  # else it never started
            self._generations.on_step = None

    def _tag(self, session_id: str, ttl_s: float) -> None:
        """Keeps what requests of this session left over what those of none did, until then."""
        timer = self._tagged.pop(session_id, None)
        if timer is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._tagged[session_id] = loop.call_later(ttl_s, self._untag, session_id)
        if len(self._tagged) > MAX_TAGGED:
            self._untag(next(iter(self._tagged)))

    def _untag(self, session_id: str) -> None:
        """Also of one that is not tagged any more: a request may have come after its end."""
        timer = self._tagged.pop(session_id, None)
        if timer is not None:
            timer.cancel()
        self._close_session(session_id)

    def _load(self, free_pages: int, pinned_pages: int) -> EngineLoad:
        """``free_pages`` before what the running contexts need."""
        generations = self._generations
        return EngineLoad(
            running=generations.running,
            queued=generations.queued,
            queued_prefill_tokens=generations.prefill_tokens,
            free_pages=max(0, free_pages - generations.pages),
            pinned_pages=pinned_pages,
            prefill_tokens_per_s=generations.rates.prefill,
            decode_tokens_per_s=generations.rates.decode,
        )
