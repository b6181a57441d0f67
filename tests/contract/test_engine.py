"""What every engine behind the port must do; engines join in tests/support/engines.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import anyio
import pytest

from tests.support.engines import PARAMS, EngineHarness, EngineSize, started
from workers.engines.port import (
    BATCH,
    INTERACTIVE,
    PREFETCH,
    EngineFinish,
    EngineOverloaded,
    PageMeta,
    PagesExhausted,
    Sampling,
    StepOutput,
)
from workers.public_prefixes import ENGINES as SHARING

pytestmark = pytest.mark.anyio

Start = Callable[[EngineSize], AbstractAsyncContextManager[EngineHarness]]


class Now:
    """A clock that tests set."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture(params=PARAMS)
def start(request: pytest.FixtureRequest, now: Now) -> Start:
    return lambda size: started(request.param, size, now)


@pytest.fixture
async def it(start: Start) -> AsyncIterator[EngineHarness]:
    async with start(EngineSize()) as harness:
        yield harness


# -- generations ------------------------------------------------------------------------------


async def test_greedy_output_repeats(it: EngineHarness) -> None:
    prompt = it.prompt(1, 21)
    first = await it.generate(prompt, 12)
    assert (len(first.tokens), first.finish) == (12, EngineFinish.MAX_TOKENS)
    again = await it.generate(prompt, 12)
    assert again.tokens == first.tokens


async def test_a_prefix_is_reused_and_changes_nothing(start: Start, it: EngineHarness) -> None:
    prompt = it.prompt(1, 21)
    page = it.engine.info.page_size
    first = await it.generate(prompt, 3 * page)
    assert first.cached_tokens == 0
    longer = [*prompt, *first.tokens, *it.prompt(2, 5)]
    warm = await it.generate(longer, 8)
    covered = (len(prompt) + len(first.tokens) - 1) // page * page
    assert warm.cached_tokens == covered > len(prompt)
    async with start(EngineSize()) as cold:
        assert (await cold.generate(longer, 8)).tokens == warm.tokens


async def test_the_last_token_is_always_computed(it: EngineHarness) -> None:
    prompt = it.prompt(1, 4 * it.engine.info.page_size)
    first = await it.generate(prompt, 4)
    again = await it.generate(prompt, 4)
    assert again.cached_tokens == 3 * it.engine.info.page_size
    assert again.tokens == first.tokens


async def test_namespaces_share_nothing(it: EngineHarness) -> None:
    prompt = it.prompt(1, 4 * it.engine.info.page_size + 1)
    first = await it.generate(prompt, 4, namespace=b"one tenant")
    other = await it.generate(prompt, 4, namespace=b"another tenant")
    assert other.cached_tokens == 0
    assert other.tokens == first.tokens
    hashes = it.hashes(prompt, b"one tenant")
    assert set(hashes).isdisjoint(it.hashes(prompt, b"another tenant"))


async def test_namespaces_share_what_is_public_and_nothing_behind_it(it: EngineHarness) -> None:
    info = it.engine.info
    if info.engine not in SHARING:
        pytest.skip("shares by rules of its own")
    page = info.page_size
    prefix = it.prompt(1, 3 * page + page // 2)  # the last half page is no page
    assert info.public.declare(info.kv_fingerprint, prefix, page) == 3
    prompt = [*prefix, *it.prompt(2, 3 * page)]
    one = await it.generate(prompt, 2 * page, namespace=b"one tenant")
    same = await it.generate(prompt, 2 * page, namespace=b"one tenant")
    other = await it.generate(prompt, 2 * page, namespace=b"another tenant")
    assert (one.cached_tokens, other.cached_tokens) == (0, 3 * page)
    assert (same.cached_tokens or 0) > 5 * page
    assert one.tokens == same.tokens == other.tokens
    ours, theirs = it.hashes(prompt, b"one tenant"), it.hashes(prompt, b"another tenant")
    assert ours[:3] == theirs[:3]
    assert set(ours[3:]).isdisjoint(theirs[3:])
    # What goes on differently within the prefix is nobody else's either.
    early = [*prefix[: 2 * page], *it.prompt(3, 2 * page + 1)]
    await it.generate(early, 2, namespace=b"one tenant")
    guess = await it.generate(early, 2, namespace=b"another tenant")
    assert guess.cached_tokens == 2 * page
    it.engine.check_integrity()


async def test_output_does_not_depend_on_the_batch(start: Start, it: EngineHarness) -> None:
    prompts = [it.prompt(seed, 10 + 9 * seed) for seed in range(6)]
    ids = [it.request(p, 10, sampling=it.noise) for p in prompts]
    together = [await it.end_of(i) for i in ids]
    async with start(EngineSize(max_running=1)) as alone:
        for prompt, output in zip(prompts, together, strict=True):
            assert (await alone.generate(prompt, 10, sampling=it.noise)).tokens == output.tokens


async def test_the_same_context_twice_at_once(it: EngineHarness) -> None:
    prompt = it.prompt(1, 5 * it.engine.info.page_size)
    ids = [it.request(prompt, 3 * it.engine.info.page_size) for _ in range(3)]
    outputs = [await it.end_of(i) for i in ids]
    assert len({output.tokens for output in outputs}) == 1
    it.engine.check_integrity()


async def test_stop_ids_end_the_generation_and_are_delivered(it: EngineHarness) -> None:
    prompt = it.prompt(1, 9)
    free = await it.generate(prompt, 12)
    stop = free.tokens[7]
    first = free.tokens.index(stop)
    stopped = await it.generate(prompt, 12, stop_token_ids=frozenset({stop}))
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish is EngineFinish.STOP_TOKEN


async def test_stop_ids_cannot_be_sampled_before_min_new_tokens(it: EngineHarness) -> None:
    prompt = it.prompt(1, 9)
    free = await it.generate(prompt, 12)
    stops = frozenset(free.tokens[:6])
    output = await it.generate(prompt, 12, stop_token_ids=stops, min_new_tokens=8)
    assert len(output.tokens) >= 8
    assert not stops & set(output.tokens[:8])


async def test_noise_is_a_function_of_seed_and_position(it: EngineHarness) -> None:
    prompt = it.prompt(1, 13)
    output = await it.generate(prompt, 16, sampling=it.noise)
    for cut in (1, 7, 15):
        rest = await it.generate([*prompt, *output.tokens[:cut]], 16 - cut, sampling=it.noise)
        assert rest.tokens == output.tokens[cut:]
    other = await it.generate(prompt, 16, sampling=Sampling(temperature=1.0, seed=12))
    assert other.tokens != output.tokens


async def test_another_engine_continues_from_the_tokens(start: Start, it: EngineHarness) -> None:
    prompt = it.prompt(1, 13)
    output = await it.generate(prompt, 16, sampling=it.noise)
    async with start(EngineSize()) as other:
        rest = await other.generate([*prompt, *output.tokens[:9]], 7, sampling=it.noise)
    assert rest.tokens == output.tokens[9:]


async def test_a_cancelled_generation_delivers_nothing_more(it: EngineHarness) -> None:
    cancelled = it.request(it.prompt(1, 9), 200)
    other = it.request(it.prompt(2, 9), 40)
    await it.until(cancelled, 3)
    it.engine.cancel(cancelled)
    seen = it.so_far(cancelled)
    await it.end_of(other)
    assert it.so_far(cancelled) == seen
    it.engine.cancel(cancelled)
    it.engine.cancel("never heard of")
    assert it.engine.load().running == 0
    # What it computed is still of use.
    longer = [*it.prompt(1, 9), *seen.tokens]
    assert (await it.generate(longer, 1)).cached_tokens == (
        (len(longer) - 1) // it.engine.info.page_size * it.engine.info.page_size
    )


async def test_a_queued_generation_can_be_cancelled(start: Start) -> None:
    async with start(EngineSize(max_running=1)) as it:
        running = it.request(it.prompt(1, 9), 20)
        queued = it.request(it.prompt(2, 9), 20)
        it.engine.cancel(queued)
        await it.end_of(running)
        assert queued not in it.outputs
        assert it.engine.load().queued == 0


async def test_a_parked_generation_waits_and_goes_on_the_same(it: EngineHarness) -> None:
    prompt = it.prompt(1, 9)
    expected = await it.generate(prompt, 30)
    parked = it.request(prompt, 30)
    await it.until(parked, 3)
    it.engine.park(parked)
    other = await it.generate(it.prompt(2, 9), 5)  # a step under way has been delivered by now
    seen = it.so_far(parked)
    assert len(seen.tokens) < 30
    assert len((await it.generate(it.prompt(3, 9), 10)).tokens) == 10
    assert it.so_far(parked) == seen
    it.engine.unpark(parked)
    assert (await it.end_of(parked)).tokens == expected.tokens
    assert other.finish is not None
    it.engine.park("never heard of")
    it.engine.unpark("never heard of")


async def test_too_many_requests_are_refused(start: Start) -> None:
    async with start(EngineSize(max_running=2, max_queued=3)) as it:
        ids: list[str] = []
        with pytest.raises(EngineOverloaded) as refused:
            ids.extend(it.request(it.prompt(seed, 9), 4) for seed in range(6))
        assert 3 <= len(ids) <= 5
        assert refused.value.retry_after_ms > 0
        for generation_id in ids:
            assert (await it.end_of(generation_id)).finish is not None
        await it.generate(it.prompt(9, 9), 4)


async def test_a_higher_priority_goes_first(start: Start) -> None:
    async with start(EngineSize(max_running=1)) as it:
        first = it.request(it.prompt(1, 9), 20)
        prefetch = it.request(it.prompt(2, 9), 4, priority=PREFETCH)
        batch = it.request(it.prompt(3, 9), 4, priority=BATCH)
        turn = it.request(it.prompt(4, 9), 4, priority=INTERACTIVE)
        await it.end_of(first)
        await it.end_of(turn)
        assert batch not in it.outputs
        await it.end_of(batch)
        assert prefetch not in it.outputs
        await it.end_of(prefetch)


async def test_bad_requests_are_refused(it: EngineHarness) -> None:
    vocab, limit = it.engine.info.vocab_size, it.engine.info.max_context_tokens
    for tokens in ([], [vocab], [1] * limit):
        with pytest.raises(ValueError, match="token"):
            it.request(tokens, 4)
    running = it.request(it.prompt(1, 9), 20)
    with pytest.raises(ValueError, match=running):
        it.request(it.prompt(1, 9), 4, generation_id=running)
    await it.end_of(running)


async def test_the_context_limit_ends_a_generation(start: Start) -> None:
    async with start(EngineSize(max_context_tokens=64)) as it:
        limit = it.engine.info.max_context_tokens
        output = await it.generate(it.prompt(1, limit - 5), 100)
        assert (len(output.tokens), output.finish) == (5, EngineFinish.MAX_TOKENS)


# -- pages ------------------------------------------------------------------------------------


async def test_a_context_that_never_fits_fails_alone(start: Start) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        other = it.request(it.prompt(1, page), 4)
        output = await it.generate(it.prompt(2, 8 * page - 2), 20)
        assert output.error is not None
        assert len(output.tokens) <= 3
        assert (await it.end_of(other)).error is None


async def test_what_waits_for_the_pages_of_a_context_that_does_not_fit_goes_on(
    start: Start,
) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        growing = it.request(it.prompt(1, 8 * page - 2), 20)
        waiting = it.request(it.prompt(2, 3 * page), 4)
        assert (await it.end_of(growing)).error is not None
        assert (await it.end_of(waiting)).finish is EngineFinish.MAX_TOKENS


async def test_a_request_in_answer_to_a_failure_is_served(start: Start) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page, on_step, asked = it.engine.info.page_size, it.on_step, list[str]()

        def ask_again(outputs: Sequence[StepOutput]) -> None:
            on_step(outputs)
            if not asked:
                asked.append(it.request(it.prompt(3, 9), 4))

        it.on_output = ask_again
        too_long, other = it.request(it.prompt(1, 9 * page), 4), it.request(it.prompt(2, 9), 20)
        assert (await it.end_of(too_long)).error is not None
        assert (await it.end_of(asked[0])).finish is EngineFinish.MAX_TOKENS
        assert (await it.end_of(other)).finish is EngineFinish.MAX_TOKENS


async def test_scarce_pages_delay_but_do_not_change_output(start: Start, it: EngineHarness) -> None:
    page = it.engine.info.page_size
    prompts = [it.prompt(seed, 2 * page + 1) for seed in range(5)]
    expected = [(await it.generate(p, 4 * page)).tokens for p in prompts]
    async with start(EngineSize(capacity_pages=12)) as small:
        ids = [small.request(p, 4 * page) for p in prompts]
        assert [(await small.end_of(i)).tokens for i in ids] == expected


async def test_exported_pages_continue_identically_elsewhere(
    start: Start, it: EngineHarness
) -> None:
    prompt = it.prompt(1, 5 * it.engine.info.page_size + 2)
    output = await it.generate(prompt, 16, sampling=it.noise)
    ledger = [*prompt, *output.tokens[:8]]
    async with start(EngineSize()) as other:
        assert other.engine.info.kv_fingerprint == it.engine.info.kv_fingerprint
        taken = await copy_pages(it, other, ledger)
        assert taken == len(ledger) // it.engine.info.page_size
        assert other.engine.resident_pages(other.hashes(ledger)) == taken
        rest = await other.generate(ledger, 8, sampling=it.noise)
        assert rest.tokens == output.tokens[8:]
        assert rest.cached_tokens == (len(ledger) - 1) // it.engine.info.page_size * (
            it.engine.info.page_size
        )


async def copy_pages(
    source: EngineHarness, target: EngineHarness, tokens: list[int], *, corrupt: int = -1
) -> int:
    """Moves what is resident of a context; flips a bit in one page on the way if asked."""
    export = source.engine.export_pages(source.hashes(tokens))
    incoming = target.engine.reserve_import(target.hashes(tokens), 0, len(export.pages))
    for index in range(len(export.pages)):
        incoming.buffer(index)[:] = export.view(index)
        if index == corrupt:
            incoming.buffer(index)[7] ^= 1
    taken = await incoming.commit(export.pages)
    incoming.release()
    export.release()
    export.release()
    return taken


async def test_a_corrupted_page_is_refused_with_all_after_it(
    start: Start, it: EngineHarness
) -> None:
    prompt = it.prompt(1, 5 * it.engine.info.page_size)
    await it.generate(prompt, 2)
    async with start(EngineSize()) as other:
        assert await copy_pages(it, other, prompt, corrupt=2) == 2
        assert other.engine.resident_pages(other.hashes(prompt)) == 2
        assert other.engine.load().free_pages == other.engine.info.capacity_pages


async def test_a_page_of_another_block_is_refused(start: Start, it: EngineHarness) -> None:
    prompt = it.prompt(1, 3 * it.engine.info.page_size)
    await it.generate(prompt, 2)
    export = it.engine.export_pages(it.hashes(prompt))
    async with start(EngineSize()) as other:
        incoming = other.engine.reserve_import(other.hashes(prompt), 0, 2)
        incoming.buffer(0)[:] = export.view(1)
        meta = PageMeta(export.pages[1].block_hash, export.pages[1].checksum)
        assert await incoming.commit([meta]) == 0
        incoming.release()
    export.release()


async def test_an_import_continues_a_resident_prefix(start: Start, it: EngineHarness) -> None:
    prompt = it.prompt(1, 6 * it.engine.info.page_size)
    await it.generate(prompt, 2)
    async with start(EngineSize()) as other:
        await other.generate(prompt[: 3 * it.engine.info.page_size], 1)
        first = other.engine.resident_pages(other.hashes(prompt))
        assert first == 3
        export = it.engine.export_pages(it.hashes(prompt))
        incoming = other.engine.reserve_import(other.hashes(prompt), first, 3)
        for index in range(3):
            incoming.buffer(index)[:] = export.view(first + index)
        assert await incoming.commit(export.pages[first:]) == 3
        incoming.release()
        export.release()
        expected = await it.generate(prompt, 6)
        assert (await other.generate(prompt, 6)).tokens == expected.tokens


async def test_exported_pages_cannot_be_evicted(start: Start) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 3 * page)
        await it.generate(prompt, 2)
        export = it.engine.export_pages(it.hashes(prompt))
        before = [bytes(export.view(i)) for i in range(3)]
        for seed in range(2, 6):
            await it.generate(it.prompt(seed, 3 * page), 2)
        assert [bytes(export.view(i)) for i in range(3)] == before
        with pytest.raises(PagesExhausted):
            it.engine.reserve_import(it.hashes(it.prompt(9, 6 * page)), 0, 6)
        export.release()
        it.engine.reserve_import(it.hashes(it.prompt(9, 6 * page)), 0, 6).release()


async def test_an_export_from_the_middle_of_a_context_holds_what_is_before_it(
    start: Start,
) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 4 * page)
        await it.generate(prompt, 2)
        export = it.engine.export_pages(it.hashes(prompt)[2:])
        assert [meta.block_hash for meta in export.pages] == it.hashes(prompt)[2:4]
        before = [bytes(export.view(i)) for i in range(2)]
        it.engine.check_integrity()
        assert it.engine.load().free_pages == 4
        with pytest.raises(PagesExhausted):
            it.engine.reserve_import(it.hashes(it.prompt(9, 5 * page)), 0, 5)
        for seed in range(2, 6):
            await it.generate(it.prompt(seed, 3 * page), 2)
        assert [bytes(export.view(i)) for i in range(2)] == before
        export.release()
        it.engine.check_integrity()
        assert it.engine.load().free_pages == 8


async def test_pins_survive_pressure_until_they_expire(start: Start, now: Now) -> None:
    async with start(EngineSize(capacity_pages=12)) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 3 * page + 1)
        await it.generate(prompt, 1)
        assert it.engine.pin("p", it.hashes(prompt), ttl_s=60.0) == 3
        assert it.engine.load().pinned_pages == 3

        async def press() -> None:
            for seed in range(2, 8):
                await it.generate(it.prompt(seed, 4 * page), 2)

        await press()
        assert it.engine.resident_pages(it.hashes(prompt)) == 3
        now.seconds += 61
        assert it.engine.load().pinned_pages == 0
        await press()
        assert it.engine.resident_pages(it.hashes(prompt)) == 0


async def test_pins_yield_to_reservations_and_generations(start: Start) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 4 * page + 1)
        await it.generate(prompt, 1)
        it.engine.pin("p", it.hashes(prompt), ttl_s=60.0)
        incoming = it.engine.reserve_import(it.hashes(it.prompt(2, 6 * page)), 0, 6)
        assert it.engine.resident_pages(it.hashes(prompt)) == 2
        incoming.release()
        await it.generate(it.prompt(3, 7 * page + 1), 2)
        assert it.engine.resident_pages(it.hashes(prompt)) == 0
        it.engine.unpin("p")


async def test_reservations_are_all_or_nothing(start: Start) -> None:
    async with start(EngineSize(capacity_pages=8)) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 2 * page + 1)
        await it.generate(prompt, 1)
        wanted = it.prompt(2, 9 * page)
        first = it.engine.reserve_import(it.hashes(wanted), 0, 5)
        with pytest.raises(PagesExhausted):
            it.engine.reserve_import(it.hashes(it.prompt(3, 9 * page)), 0, 4)
        assert it.engine.resident_pages(it.hashes(prompt)) == 2, "a refusal evicts nothing"
        first.release()
        first.release()
        assert it.engine.load().free_pages == 8
        with pytest.raises(PagesExhausted):
            it.engine.reserve_import(it.hashes(wanted), 0, 9)


async def test_drop_frees_what_nothing_else_needs(it: EngineHarness) -> None:
    page = it.engine.info.page_size
    shared = it.prompt(1, 2 * page)
    one, two = [*shared, *it.prompt(2, 2 * page + 1)], [*shared, *it.prompt(3, 2 * page + 1)]
    await it.generate(one, 1)
    await it.generate(two, 1)
    assert it.engine.drop(it.hashes(one)) == 2
    assert it.engine.resident_pages(it.hashes(one)) == 2
    assert it.engine.resident_pages(it.hashes(two)) == 4
    it.engine.pin("p", it.hashes(two), ttl_s=60.0)
    assert it.engine.drop(it.hashes(two)) == 0
    it.engine.unpin("p")
    assert it.engine.drop(it.hashes(two)) == 4


async def test_what_was_dropped_in_use_is_freed_when_it_is_let_go_of(it: EngineHarness) -> None:
    page = it.engine.info.page_size
    prompt = it.prompt(1, 3 * page + 1)
    running = it.request(prompt, 100)
    await it.until(running, 1)
    assert it.engine.drop(it.hashes(prompt)) == 0
    assert it.engine.resident_pages(it.hashes(prompt)) == 3
    it.engine.cancel(running)
    await it.generate(it.prompt(2, 2 * page), 2)  # the step that was under way has ended
    assert it.engine.resident_pages(it.hashes(prompt)) == 0


async def test_what_was_dropped_in_use_stays_if_it_is_asked_for_again(it: EngineHarness) -> None:
    page = it.engine.info.page_size
    prompt = it.prompt(1, 3 * page + 1)
    running = it.request(prompt, 100)
    await it.until(running, 1)
    assert it.engine.drop(it.hashes(prompt)) == 0
    assert it.engine.pin("p", it.hashes(prompt), ttl_s=60.0) == 3
    it.engine.cancel(running)
    it.engine.unpin("p")
    await it.generate(it.prompt(2, 2 * page), 2)
    assert it.engine.resident_pages(it.hashes(prompt)) == 3


@pytest.mark.parametrize("tokens", [1, 2, 5])
async def test_a_step_under_way_leaves_no_page_of_a_cancelled_generation(
    start: Start, tokens: int
) -> None:
    async with start(EngineSize()) as it:
        page = it.engine.info.page_size
        prompt = it.prompt(1, 3 * page - tokens)
        running = it.request(prompt, 100)
        await it.until(running, tokens)  # the next step fills a page
        said = it.so_far(running).tokens
        it.engine.cancel(running)
        it.engine.drop(it.hashes([*prompt, *said]))
        await it.generate(it.prompt(2, 2 * page), 2)
        assert it.engine.load().free_pages == it.engine.info.capacity_pages
        assert it.engine.resident_pages(it.hashes([*prompt, *said])) == 0


async def test_closing_ends_everything_without_output(start: Start) -> None:
    async with start(EngineSize()) as it:
        running = it.request(it.prompt(1, 9), 100)
        await it.until(running, 2)
        await it.engine.aclose()
        seen = it.so_far(running)
        await anyio.lowlevel.checkpoint()
        await it.engine.aclose()
        assert it.so_far(running) == seen
        assert seen.finish is None


async def test_load_counts_what_runs_and_waits(start: Start) -> None:
    async with start(EngineSize(max_running=1)) as it:
        running = it.request(it.prompt(1, 9), 30)
        waiting = it.request(it.prompt(2, 17), 2)
        await it.until(running, 2)
        load = it.engine.load()
        assert (load.running, load.queued, load.queued_prefill_tokens) == (1, 1, 17)
        assert load.free_pages < it.engine.info.capacity_pages
        await it.end_of(waiting)
        load = it.engine.load()
        assert (load.running, load.queued, load.queued_prefill_tokens) == (0, 0, 0)
        assert load.free_pages == it.engine.info.capacity_pages
