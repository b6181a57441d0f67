"""Tenants in one engine's scheduler: nobody waits for what another asks for beyond its share."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from workers.engines.fair_shares import FairShares
from workers.engines.port import GenerateRequest, Sampling, StepOutput
from workers.engines.scheduling import Scheduler
from workers.engines.sim.config import SimConfig
from workers.kv.prefix_cache import PrefixCache

GREEDY, MODEST, THIRD = b"greedy", b"modest", b"third"
PAGE = 4


class Steps:
    """An engine without a model: every generation says 1 until it is at its end."""

    def __init__(
        self, *, pages: int = 1000, max_running: int = 4, max_prefill_tokens: int = 16
    ) -> None:
        config = SimConfig(
            page_size=PAGE,
            capacity_pages=pages,
            max_context_tokens=4096,
            max_running=max_running,
            max_queued=1000,
        )
        cache = PrefixCache(pages, lambda: 0.0)
        self.scheduler = Scheduler(config.info(), cache, max_prefill_tokens=max_prefill_tokens)
        self.tenant: dict[str, bytes] = {}
        self.tokens: Counter[str] = Counter()
        self.ended: list[str] = []
        self.computed: Counter[bytes] = Counter()
        """Prompt tokens, by tenant."""
        self._number = itertools.count()

    def ask(self, tenant: bytes, prompt: int, output: int, *, priority: int = 0) -> str:
        number = next(self._number)
        name = f"{tenant.decode()} {number}"
        tokens = [(number * 31 + i) % 200 for i in range(prompt)]
        request = GenerateRequest(name, tokens, tenant, Sampling(), output, priority=priority)
        self.scheduler.submit(request, retry_after_ms=1)
        self.tenant[name] = tenant
        return name

    def step(self) -> Counter[bytes]:
        """Makes one; how many generations of each tenant were in it."""
        works, failures = self.scheduler.plan()
        assert not failures
        for work in works:
            generation = work.generation
            tenant = generation.request.namespace
            self.computed[tenant] += work.count if work.count > 1 else 0
            self.scheduler.advance(work, lambda page: page)
            if not generation.pending:
                self._said(self.scheduler.add_token(generation, 1))
        self.scheduler.end_step()
        return Counter(work.generation.request.namespace for work in works)

    def _said(self, output: StepOutput) -> None:
        self.tokens[output.generation_id] += 1
        if output.finish is not None:
            self.ended.append(output.generation_id)

    def until_end_of(self, name: str) -> int:
        """Steps that it takes."""
        for count in range(1, 10_000):
            self.step()
            if name in self.ended:
                return count
        pytest.fail(f"{name} does not end")


def test_a_queue_of_one_tenant_keeps_no_other_waiting() -> None:
    steps = Steps(max_running=2)
    for _ in range(20):
        steps.ask(GREEDY, 8, 50)
    for _ in range(5):
        steps.step()
    assert steps.until_end_of(steps.ask(MODEST, 8, 10)) <= 12


def test_a_tenant_that_has_every_place_gives_back_what_is_beyond_its_share() -> None:
    steps = Steps(max_running=4)
    for _ in range(4):
        steps.ask(GREEDY, 8, 200)
    steps.step()
    for _ in range(3):
        steps.ask(MODEST, 8, 40)
    assert [steps.step() for _ in range(10)][-1] == {GREEDY: 2, MODEST: 2}
    steps.ask(THIRD, 8, 20)
    shared = [steps.step() for _ in range(10)][-1]
    assert shared[THIRD] == 0 or shared[THIRD] == 1
    assert min(shared[GREEDY], shared[MODEST]) >= 1, "nobody is taken its share"


def test_who_gave_back_a_place_goes_on_afterwards() -> None:
    steps = Steps(max_running=2)
    names = [steps.ask(GREEDY, 8, 30) for _ in range(2)]
    for _ in range(5):
        steps.step()
    steps.until_end_of(steps.ask(MODEST, 8, 5))
    for name in names:
        if name not in steps.ended:
            steps.until_end_of(name)
    assert [steps.tokens[name] for name in names] == [30, 30]


def test_places_do_not_go_back_and_forth() -> None:
    steps = Steps(max_running=4)
    for tenant in (GREEDY, MODEST):
        for _ in range(6):
            steps.ask(tenant, 8, 400)
    for _ in range(10):
        steps.step()
    before = {work.generation.request.generation_id for work in steps.scheduler.plan()[0]}
    steps.scheduler.end_step()
    for _ in range(50):
        steps.step()
    after = {work.generation.request.generation_id for work in steps.scheduler.plan()[0]}
    assert before == after


def test_long_prompts_of_one_tenant_share_a_step_with_another_s() -> None:
    steps = Steps(max_running=8, max_prefill_tokens=16)
    for _ in range(4):
        steps.ask(GREEDY, 400, 1)
    for _ in range(3):
        steps.step()
    name = steps.ask(MODEST, 64, 1)
    # Its 4 chunks, and as many of the other tenant's between them.
    assert steps.until_end_of(name) <= 2 * 64 // 16 + 1


def test_tenants_that_always_want_more_get_as_much() -> None:
    steps = Steps(max_running=6, max_prefill_tokens=16)
    for _ in range(30):
        steps.ask(GREEDY, 200, 1)
    for _ in range(10):
        steps.ask(MODEST, 60, 1)
    for _ in range(40):
        steps.step()
    assert steps.computed[MODEST] == pytest.approx(steps.computed[GREEDY], rel=0.15)


def test_growing_contexts_take_pages_from_the_tenant_that_has_most() -> None:
    steps = Steps(pages=40, max_running=8, max_prefill_tokens=1000)
    for _ in range(4):
        steps.ask(GREEDY, 20, 60)
    steps.step()
    name = steps.ask(MODEST, 8, 40)
    assert steps.until_end_of(name) <= 42, "it was preempted"


def test_a_lone_context_is_not_taken_its_pages_for_being_large() -> None:
    steps = Steps(pages=20, max_running=4, max_prefill_tokens=1000)
    large = steps.ask(GREEDY, 60, 16)
    steps.step()
    waiting = steps.ask(MODEST, 30, 4)
    steps.until_end_of(large)
    assert waiting not in steps.ended
    steps.until_end_of(waiting)


def test_a_higher_priority_is_not_preempted_for_a_share() -> None:
    steps = Steps(max_running=2)
    for _ in range(2):
        steps.ask(GREEDY, 8, 20, priority=1)
    steps.step()
    steps.ask(MODEST, 8, 5)
    assert steps.step() == {GREEDY: 2}


def test_who_had_much_is_not_overtaken_for_ever_by_those_who_come_anew() -> None:
    steps = Steps(max_running=4)
    steps.ask(MODEST, 8, 4080)
    for _ in range(6):
        steps.ask(GREEDY, 8, 200)
    while steps.scheduler.queued:
        steps.step()
    name = steps.ask(GREEDY, 8, 5)
    for number in range(3000):
        if steps.scheduler.queued < 4:
            steps.ask(b"agent %d" % number, 8, 10)
        steps.step()
        if name in steps.ended:
            return
    pytest.fail("a tenant that had more than those who come now starves")


def test_a_place_is_given_up_to_one_of_many_tenants() -> None:
    steps = Steps(max_running=2)
    for _ in range(2):
        steps.ask(GREEDY, 8, 500)
    steps.step()
    names = [steps.ask(b"tenant %d" % number, 8, 5) for number in range(4)]
    for name in names:
        if name not in steps.ended:
            steps.until_end_of(name)
    assert max(steps.tokens[name] for name in steps.tokens if name.startswith("greedy")) < 100


def test_work_that_is_dropped_for_pages_is_not_charged() -> None:
    """A large context of the tenant that has had less is planned first, and gives its pages up
    later in the same plan."""
    steps = Steps(pages=70, max_running=4, max_prefill_tokens=1000)
    for _ in range(2):
        steps.ask(GREEDY, 8, 200)
    steps.ask(MODEST, 102, 200)
    shares = steps.scheduler._shares
    for _ in range(100):
        had = shares.served(MODEST)
        if MODEST not in steps.step():
            assert shares.served(MODEST) == had
            return
    pytest.fail("nothing was dropped")


def test_one_tenant_alone_is_served_in_order() -> None:
    steps = Steps(max_running=1)
    names = [steps.ask(GREEDY, 8, 3) for _ in range(5)]
    steps.until_end_of(names[-1])
    assert steps.ended == names


def test_idle_time_is_not_saved_up_and_nothing_is_kept_of_who_left() -> None:
    shares = FairShares()
    shares.arrived(GREEDY)
    shares.charge(GREEDY, prompt=1000)
    shares.arrived(MODEST)
    assert shares.served(MODEST) == shares.served(GREEDY) == 1000
    shares.charge(MODEST, sampled=1)
    assert shares.served(MODEST) == 1002
    shares.arrived(GREEDY)
    shares.left(GREEDY)
    assert len(shares) == 2
    shares.left(GREEDY)
    shares.left(MODEST)
    assert len(shares) == 0
