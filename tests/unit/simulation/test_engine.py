"""KV on the simulated engine: pages that do not hold what they should are told by their rule."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from loadtest.simulation.engine import WatchedEngine, page_name, root_name
from loadtest.simulation.loop import run
from workers.engines.port import GenerateRequest, PageMeta, Sampling
from workers.engines.sim.config import SimConfig, SimTiming
from workers.kv.blocks import block_hashes

CONFIG = SimConfig(page_size=4, capacity_pages=16, eos_probability=0, timing=SimTiming(step_ms=1))
PROMPT = list(range(40, 53))
TENANT = b"tenant"


class Pair:
    """A source that has computed three pages of the prompt, and a target that has none."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.source = WatchedEngine(CONFIG, self.complaints.append)
        self.target = WatchedEngine(CONFIG, self.complaints.append)
        self.names = self.source.block_hashes(TENANT, PROMPT)

    async def generate(self, engine: WatchedEngine, namespace: bytes = TENANT) -> None:
        name = f"g{anyio.current_time()}"
        engine.submit(GenerateRequest(name, PROMPT, namespace, Sampling(), 2))
        await anyio.sleep(1)

    async def send(self) -> None:
        """All pages of the prompt."""
        export = self.source.export_pages(self.names)
        arriving = self.target.reserve_import(self.names, 0, len(export.pages))
        for index in range(len(export.pages)):
            arriving.buffer(index)[:] = export.view(index)
            self.target.page_arrives(self.source, export, arriving, index)
        await arriving.commit(export.pages)
        export.release()

    def page(self, engine: WatchedEngine, index: int) -> memoryview:
        """Memory of one of the prompt's pages."""
        pages, held = engine._cache.acquire_part(self.names)
        engine._cache.release(held)
        return engine._watched.page(pages[index])


def in_virtual_time(test: Callable[[Pair], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def wrapped() -> None:
        async def main() -> None:
            pair = Pair()
            for engine in (pair.source, pair.target):
                await engine.start(lambda _: None, lambda _: None)
            await pair.generate(pair.source)
            await test(pair)
            for engine in (pair.source, pair.target):
                await engine.aclose()

        run(main, 0)

    wrapped.__name__ = test.__name__
    return wrapped


def test_pages_are_named_as_the_engine_names_them() -> None:
    names, name = [], root_name(b"kv", TENANT)
    for at in range(0, 12, 4):
        name = page_name(name, PROMPT[at : at + 4])
        names.append(name)
    assert names == block_hashes(b"kv", TENANT, PROMPT, 4)


@in_virtual_time
async def test_pages_that_hold_what_they_say_arrive_and_are_used(pair: Pair) -> None:
    await pair.send()
    await pair.generate(pair.target)
    assert pair.complaints == []
    assert pair.target.verified_pages == 3
    await pair.generate(pair.target)
    assert pair.target.verified_pages == 6


@in_virtual_time
async def test_a_page_whose_bytes_are_others_is_told_when_it_is_sent(pair: Pair) -> None:
    pair.page(pair.source, 1)[0] ^= 1
    await pair.send()
    (what,) = pair.complaints
    assert what.startswith("P13: ")


@in_virtual_time
async def test_its_checksum_does_not_excuse_it(pair: Pair) -> None:
    pair.page(pair.source, 1)[0] ^= 1
    export: Any = pair.source.export_pages(pair.names)
    metas = export._metas
    metas[1] = PageMeta(metas[1].block_hash, metas[1].checksum ^ 1)
    arriving = pair.target.reserve_import(pair.names, 0, 3)
    pair.target.page_arrives(pair.source, export, arriving, 1)
    assert [what[:4] for what in pair.complaints] == ["P13:"]


@in_virtual_time
async def test_a_name_of_no_tokens_is_told(pair: Pair) -> None:
    export: Any = pair.source.export_pages(pair.names)
    metas = export._metas
    metas[0] = PageMeta(b"x" * 16, metas[0].checksum)
    arriving = pair.target.reserve_import(pair.names, 0, 3)
    pair.target.page_arrives(pair.source, export, arriving, 0)
    assert [what[:4] for what in pair.complaints] == ["P13:"]


@in_virtual_time
async def test_a_page_that_could_be_evicted_is_told_before_it_is(pair: Pair) -> None:
    export = pair.source.export_pages(pair.names)
    pair.source.pin("pinned", pair.names, 60)
    arriving = pair.target.reserve_import(pair.names, 0, 3)
    pair.target.page_arrives(pair.source, export, arriving, 0)
    assert pair.complaints == []
    export.release()
    pair.target.page_arrives(pair.source, export, arriving, 1)
    assert pair.complaints == ["P13: a page is sent that nobody holds (1)"]


@in_virtual_time
async def test_a_page_that_was_evicted_is_told_though_its_bytes_are_still_there(
    pair: Pair,
) -> None:
    export = pair.source.export_pages(pair.names)
    arriving = pair.target.reserve_import(pair.names, 0, 3)
    export.release()
    assert pair.source.evict_all() == 3
    pair.target.page_arrives(pair.source, export, arriving, 1)
    assert pair.complaints == ["P13: a page is sent that nobody holds (1)"]


@in_virtual_time
async def test_cached_pages_of_other_tokens_are_told_when_they_are_used(pair: Pair) -> None:
    pair.page(pair.source, 2)[5] ^= 1
    await pair.generate(pair.source)
    assert [what[:3] for what in pair.complaints] == ["I5:"]


@in_virtual_time
async def test_pages_of_another_tenant_are_told_also_where_they_were_imported(pair: Pair) -> None:
    computed_for = pair.source._watched.computed_for
    for page in [*computed_for]:
        computed_for[page] = b"another"
    await pair.send()
    await pair.generate(pair.target)
    assert {what[:4] for what in pair.complaints} == {"I10:"}


def test_an_engine_remembers_no_generation_that_has_ended() -> None:
    async def main() -> None:
        engine = WatchedEngine(CONFIG, lambda _: None)
        await engine.start(lambda _: None, lambda _: None)
        for index in range(4):
            engine.submit(GenerateRequest(f"g{index}", PROMPT[index:], TENANT, Sampling(), 2))
            await anyio.sleep(1)
        assert len(engine._references) <= 1
        await engine.aclose()

    run(main, 0)
