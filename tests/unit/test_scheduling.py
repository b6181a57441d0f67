"""The scheduler by itself: what a step is made of."""

from __future__ import annotations

from workers.engines.port import BATCH, INTERACTIVE, GenerateRequest, Sampling
from workers.engines.scheduling import Scheduler
from workers.engines.sim.config import SimConfig
from workers.kv.prefix_cache import PrefixCache

CONFIG = SimConfig(page_size=4, capacity_pages=4, max_context_tokens=64)


def test_growing_ahead_takes_no_more_than_is_free() -> None:
    cache = PrefixCache(CONFIG.capacity_pages, lambda: 0.0)
    scheduler = Scheduler(CONFIG.info(), cache, max_prefill_tokens=16)
    scheduler.submit(GenerateRequest("g", list(range(8)), b"", Sampling(), 40), retry_after_ms=1)
    for step in range(7):
        works, failures = scheduler.plan()
        assert not failures
        assert len(works) == 1, f"preempted in step {step}, with {cache.free_pages} pages free"
        scheduler.advance(works[0], lambda page: page)
        scheduler.add_token(works[0].generation, 1)
        scheduler.end_step()
    assert scheduler.running == 1


def test_pages_that_are_short_are_taken_from_the_batch_turn_though_it_is_the_older_one() -> None:
    cache = PrefixCache(CONFIG.capacity_pages, lambda: 0.0)
    scheduler = Scheduler(CONFIG.info(), cache, max_prefill_tokens=16)
    prompts = {"batch": [1, 2, 3], "turn": [4, 5, 6]}
    running = []
    for step in range(12):
        if step < 2:
            name, priority = (("batch", BATCH), ("turn", INTERACTIVE))[step]
            request = GenerateRequest(name, prompts[name], b"", Sampling(), 40, priority=priority)
            scheduler.submit(request, retry_after_ms=1)
        works, failures = scheduler.plan()
        assert not failures
        running.append({work.generation.request.generation_id for work in works})
        for work in works:
            scheduler.advance(work, lambda page: page)
            if work.generation.pending == 0:
                scheduler.add_token(work.generation, 1)
        scheduler.end_step()
    assert running[:2] == [{"batch"}, {"batch", "turn"}]
    assert running[-1] == {"turn"}
    assert (scheduler.running, scheduler.queued) == (1, 1)
