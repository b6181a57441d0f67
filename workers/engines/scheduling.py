"""Continuous batching over a paged pool: which generation computes which tokens in the next step.

Pure bookkeeping without tensors or tasks; an engine asks :meth:`Scheduler.plan` for work, computes
it, and reports it with :meth:`Scheduler.advance` and :meth:`Scheduler.add_token` between
:meth:`Scheduler.plan` and :meth:`Scheduler.end_step`. After the iteration-level scheduling of Orca,
with the chunked prefill of Sarathi: every generation that decodes gets its token in every step, and
prompts share what is left of the step's budget.

Places and prompt tokens go by priority; then to the tenant that has had least
(:mod:`workers.engines.fair_shares`); then to the oldest. So a tenant that asks for more than its
share makes its own turns wait. One that came when there was nobody else gives back what it has
beyond its share; nobody is taken more, so nothing goes back and forth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from statestore.digest import pack_tokens
from workers.engines.fair_shares import FairShares
from workers.engines.port import (
    EngineFinish,
    EngineInfo,
    EngineOverloaded,
    GenerateRequest,
    PagesExhausted,
    StepOutput,
)
from workers.kv.blocks import block_hashes, page_name
from workers.kv.prefix_cache import PrefixCache

GROWTH_PAGES = 4
"""Pages that a growing generation takes at once, at most, beyond those it needs."""


@dataclass(slots=True, eq=False)
class Generation:
    """A context that grows. ``tokens[:computed]`` have their KV in ``pages``, of which the first
    ``sealed`` are cached under ``hashes``."""

    request: GenerateRequest
    rank: tuple[int, int]
    """Lower first: higher priority, then older."""
    tokens: list[int]
    hashes: list[bytes] | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    sealed: int = 0
    generated: int = 0
    cached_tokens: int | None = None
    parked: bool = False
    ended: bool = False
    submitted_at: float = 0.0
    begun_at: float | None = None
    """When its first step began; both by the engine's clock."""
    state: object | None = None
    """Whatever the engine keeps for ``tokens[:computed]``; None again after a preemption."""

    @property
    def pending(self) -> int:
        """Tokens that must be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def __lt__(self, other: Generation) -> bool:
        return self.rank < other.rank


@dataclass(frozen=True, slots=True)
class Work:
    """Compute ``generation.tokens[start : start + count]`` in this step. If nothing is pending
    afterwards, sample the next token."""

    generation: Generation
    start: int
    count: int


class Scheduler:
    """``max_prefill_tokens`` bounds the prompt tokens of one step; chunks that do not end a prompt
    end at a multiple of ``chunk_multiple`` tokens (kernels repeat their bits only on equal edges).
    """

    def __init__(
        self,
        info: EngineInfo,
        cache: PrefixCache,
        *,
        max_prefill_tokens: int,
        chunk_multiple: int = 1,
    ) -> None:
        if max_prefill_tokens < chunk_multiple:
            raise ValueError("a step must have room for one prefill chunk")
        self._info = info
        self._cache = cache
        self._max_prefill_tokens = max_prefill_tokens
        self._chunk_multiple = chunk_multiple
        self._by_id: dict[str, Generation] = {}
        self._queue: list[Generation] = []
        self._running: dict[Generation, None] = {}
        """In the order of their admission; each step asks of each whether it is still there."""
        self._in_step: list[Work] = []
        self._shares = FairShares()
        self._sequence = itertools.count()

    # -- requests -----------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, retry_after_ms: int, *, now: float = 0.0) -> None:
        """Queues a generation; see :meth:`workers.engines.port.Engine.submit`."""
        self._check(request)
        if len(self._by_id) >= self._info.max_running + self._info.max_queued:
            raise EngineOverloaded(
                f"{self._info.max_queued} generations are queued already", retry_after_ms
            )
        rank = (-request.priority, next(self._sequence))
        generation = Generation(request, rank, list(request.tokens), submitted_at=now)
        self._by_id[request.generation_id] = generation
        waits = any(g.request.namespace == request.namespace for g in self._queue)
        self._shares.arrived(request.namespace, waits=waits)
        self._queue.append(generation)

    def set_parked(self, generation_id: str, parked: bool) -> None:
        generation = self._by_id.get(generation_id)
        if generation is not None:
            generation.parked = parked

    def cancel(self, generation_id: str) -> None:
        """Ends a generation; unknown ids are ignored. Pages that a step is writing to are kept
        until it ends."""
        generation = self._by_id.get(generation_id)
        if generation is not None:
            self._end(generation)

    def _check(self, request: GenerateRequest) -> None:
        tokens = request.tokens
        if request.generation_id in self._by_id:
            raise ValueError(f"generation {request.generation_id} exists")
        if not 0 < len(tokens) < self._info.max_context_tokens:
            raise ValueError(
                f"the context has {len(tokens)} tokens; 1 to {self._info.max_context_tokens - 1} "
                "can be continued"
            )
        if min(tokens) < 0 or max(tokens) >= self._info.vocab_size:
            raise ValueError("a token is outside the vocabulary")
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")

    # -- steps --------------------------------------------------------------------------------

    def plan(self) -> tuple[list[Work], list[StepOutput]]:
        """Work of the next step, and the ends of generations that can never fit. Admits from the
        queue, and grows, evicts and preempts for pages. No work: nothing can be done until a
        request arrives, is unparked or ends, or pages are freed."""
        if self._in_step:
            raise RuntimeError("the last step was not ended")
        failures = self._admit()
        budget = self._max_prefill_tokens
        for generation in sorted(self._running, key=self._turn):
            if generation.parked or generation not in self._running:
                continue
            count = 1 if generation.pending == 1 else self._chunk(generation, budget)
            if count == 0:
                continue
            needed = self._pages_for(generation.computed + count)
            if needed > self._info.capacity_pages:
                failures.append(self._fail(generation))
                continue
            if not self._grow(generation, needed):
                continue
            if generation.pending > 1:
                budget -= count
            self._in_step.append(Work(generation, generation.computed, count))
        # A later generation's growth may have preempted an earlier one of lower priority.
        self._in_step = [work for work in self._in_step if work.generation in self._running]
        for work in self._in_step:
            tenant = work.generation.request.namespace
            if work.generation.pending > 1:
                self._shares.charge(tenant, prompt=work.count)
            else:
                self._shares.charge(tenant, sampled=1)
        return list(self._in_step), failures

    def advance(self, work: Work, checksum: Callable[[int], int]) -> None:
        """The work's tokens are computed: seals the pages they filled. ``checksum`` reads a
        page."""
        generation = work.generation
        size = self._info.page_size
        generation.computed = work.start + work.count
        while generation.sealed < generation.computed // size:
            index = generation.sealed
            block_hash = self._hash_of(generation, index)
            parent = self._hash_of(generation, index - 1) if index else None
            page = generation.pages[index]
            generation.pages[index] = self._cache.seal(page, block_hash, parent, checksum(page))
            generation.sealed += 1

    def add_token(self, generation: Generation, token: int) -> StepOutput:
        """A sampled token; ends the generation if it is the last."""
        generation.tokens.append(token)
        generation.generated += 1
        finish = None
        if token in generation.request.stop_token_ids:
            finish = EngineFinish.STOP_TOKEN
        elif (
            generation.generated >= generation.request.max_new_tokens
            or len(generation.tokens) >= self._info.max_context_tokens
        ):
            finish = EngineFinish.MAX_TOKENS
        if finish is not None:
            self._end(generation)
        cached = generation.cached_tokens if generation.generated == 1 else None
        return StepOutput(generation.request.generation_id, (token,), finish, cached)

    def end_step(self) -> None:
        """The step's pages are no longer written to."""
        works, self._in_step = self._in_step, []
        for work in works:
            if work.generation.ended:
                self._free(work.generation)

    # -- reading ------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._by_id) - len(self._running)

    def generation_ids(self) -> list[str]:
        """Everything that runs or waits."""
        return list(self._by_id)

    @property
    def pending_prefill_tokens(self) -> int:
        return sum(g.pending for g in self._by_id.values() if g.pending > 1)

    def holders(self) -> list[list[int]]:
        """Pages of every generation, for the cache's integrity check."""
        ended = [w.generation for w in self._in_step if w.generation.ended]
        return [g.pages for g in [*self._running, *ended]]

    # -- inside -------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._info.page_size)

    def _chunk(self, generation: Generation, budget: int) -> int:
        if generation.pending <= budget:
            return generation.pending
        end = generation.computed + budget
        return max(0, end - end % self._chunk_multiple - generation.computed)

    def _turn(self, generation: Generation) -> tuple[int, float, int]:
        """Lower first."""
        priority, age = generation.rank
        return priority, self._shares.served(generation.request.namespace), age

    def _admit(self) -> list[StepOutput]:
        failures: list[StepOutput] = []
        while self._queue:
            generation = min(self._queue, key=self._turn)
            if self._pages_for(len(generation.tokens)) > self._info.capacity_pages:
                failures.append(self._fail(generation))
                continue
            while len(self._running) >= self._info.max_running or not self._place(generation):
                excess = self._beyond_share(generation)
                if excess is None:
                    return failures
                self._preempt(excess)
            self._queue.remove(generation)
            self._running[generation] = None
        return failures

    def _beyond_share(self, newcomer: Generation) -> Generation | None:
        """One that has to give way, as its tenant has its share of the engine without it and the
        newcomer's has not: the youngest of the tenant that has most."""
        tenants = self._by_tenant(self._running)
        own = tenants.pop(newcomer.request.namespace, [])
        # No part is smaller than a place: of more tenants than places nobody could claim one.
        equal = 1 / min(len(self._shares), self._info.max_running)
        if not tenants or self._share_of([*own, newcomer]) > equal:
            return None
        most = max(tenants.values(), key=self._share_of)
        excess = max(most)
        rest = [generation for generation in most if generation is not excess]
        if excess.request.priority > newcomer.request.priority or self._share_of(rest) < equal:
            return None
        return excess

    def _share_of(self, generations: Sequence[Generation]) -> float:
        """Of the places or of the pages, whichever is more (as in dominant resource fairness).
        Pages that several share count for each."""
        pages = sum(max(len(g.pages), self._pages_for(len(g.tokens))) for g in generations)
        return max(len(generations) / self._info.max_running, pages / self._info.capacity_pages)

    def _by_tenant(self, generations: Iterable[Generation]) -> dict[bytes, list[Generation]]:
        found: dict[bytes, list[Generation]] = {}
        for generation in generations:
            found.setdefault(generation.request.namespace, []).append(generation)
        return found

    def _place(self, generation: Generation) -> bool:
        """Takes the resident prefix and open pages for the rest of the context. The last token is
        always computed. Leaves every running generation a page to grow into."""
        reusable = (len(generation.tokens) - 1) // self._info.page_size
        if generation.hashes is None:
            generation.hashes = block_hashes(
                self._info.kv_fingerprint,
                generation.request.namespace,
                generation.tokens,
                self._info.page_size,
                self._info.public,
            )
        pages = self._cache.acquire(generation.hashes[:reusable])
        missing = self._pages_for(len(generation.tokens)) - len(pages)
        if self._running and missing + len(self._running) > self._cache.free_pages:
            self._cache.release(pages)
            return False
        try:
            generation.pages = pages + self._cache.allocate(missing, pages[-1] if pages else None)
        except PagesExhausted:
            self._cache.release(pages)
            return False
        generation.sealed = len(pages)
        generation.computed = len(pages) * self._info.page_size
        if generation.cached_tokens is None:
            generation.cached_tokens = generation.computed
        return True

    def _grow(self, generation: Generation, needed: int) -> bool:
        while (missing := needed - len(generation.pages)) > 0:
            wanted = max(missing, self._pages_ahead(generation))
            try:
                generation.pages += self._cache.allocate(wanted, generation.pages[-1])
            except PagesExhausted:
                victim = self._least_due()
                self._preempt(victim)
                if victim is generation:
                    return False
        return True

    def _least_due(self) -> Generation:
        """Who gives its pages to one that grows: of the lowest priority, of the tenant that has
        most of them, the youngest."""
        lowest = min(generation.request.priority for generation in self._running)
        low = (g for g in self._running if g.request.priority == lowest)
        most = max(self._by_tenant(low).values(), key=self._share_of)
        return max(most)

    def _pages_ahead(self, generation: Generation) -> int:
        """Pages to take at once while there are plenty, so that more of them are neighbours."""
        if self._cache.free_pages < self._info.capacity_pages // 2:
            return 0
        limit = len(generation.request.tokens) + generation.request.max_new_tokens
        ahead = self._pages_for(limit) - len(generation.pages)
        return min(GROWTH_PAGES, self._cache.free_pages, ahead)

    def _preempt(self, generation: Generation) -> None:
        """Back to the queue; what it computed stays cached as long as there is room."""
        del self._running[generation]
        self._free(generation)
        generation.computed = generation.sealed = 0
        generation.state = None
        self._queue.append(generation)

    def _fail(self, generation: Generation) -> StepOutput:
        self._end(generation)
        return StepOutput(
            generation.request.generation_id,
            (),
            error=f"a context of {len(generation.tokens)} tokens does not fit "
            f"{self._info.capacity_pages} KV pages of {self._info.page_size} tokens",
        )

    def _end(self, generation: Generation) -> None:
        generation.ended = True
        del self._by_id[generation.request.generation_id]
        self._shares.left(generation.request.namespace)
        if generation in self._running:
            del self._running[generation]
        else:
            self._queue.remove(generation)
        if all(work.generation is not generation for work in self._in_step):
            self._free(generation)

    def _free(self, generation: Generation) -> None:
        self._cache.release(generation.pages)
        generation.pages = []

    def _hash_of(self, generation: Generation, index: int) -> bytes:
        hashes = generation.hashes
        assert hashes is not None
        if index == len(hashes):
            size = self._info.page_size
            page = generation.tokens[index * size : (index + 1) * size]
            hashes.append(
                page_name(
                    self._info.kv_fingerprint,
                    generation.request.namespace,
                    self._info.public,
                    hashes[-1] if hashes else None,
                    pack_tokens(page),
                )
            )
        return hashes[index]
