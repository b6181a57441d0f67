"""The sim engine under random use in virtual time: it says what the reference says."""

from __future__ import annotations

import random
from collections.abc import Sequence

import anyio
import pytest

from loadtest.simulation.loop import VirtualClock, run
from workers.engines.port import (
    EngineFailed,
    EngineOverloaded,
    GenerateRequest,
    PageExport,
    PageImport,
    PagesExhausted,
    Sampling,
    StepOutput,
)
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.engine import SimEngine
from workers.engines.sim.model import Context, expected_output

NAMESPACE = b"tenant"
CONFIG = SimConfig(
    page_size=4,
    capacity_pages=24,
    max_context_tokens=128,
    max_running=4,
    max_queued=4,
    eos_probability=0.03,
    timing=SimTiming(max_prefill_tokens=16),
)


class Client:
    """Draws contexts that share prefixes, and remembers what was asked and delivered."""

    def __init__(self, engine: SimEngine, draw: random.Random) -> None:
        self.engine = engine
        self.draw = draw
        self.asked: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.cancelled: set[str] = set()
        self.failures: list[EngineFailed] = []

    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            name = output.generation_id
            assert name not in self.ended | self.cancelled, "nothing follows an end"
            assert output.error is None
            self.tokens[name] += output.tokens
            if output.finish is not None:
                self.ended.add(name)

    def context(self) -> list[int]:
        base = [10 * self.draw.randrange(3) + i % 10 for i in range(24)]
        own = [self.draw.randrange(3) for _ in range(self.draw.randrange(1, 9))]
        return base[: self.draw.randrange(0, 25)] + own

    def submit(self) -> None:
        name = f"g{len(self.asked)}"
        request = GenerateRequest(
            name,
            self.context(),
            NAMESPACE,
            Sampling(self.draw.choice([0.0, 1.0]), seed=self.draw.randrange(3)),
            max_new_tokens=self.draw.randrange(1, 40),
            stop_token_ids=frozenset(self.engine.info.eos_token_ids),
            priority=self.draw.randrange(2),
        )
        try:
            self.engine.submit(request)
        except EngineOverloaded:
            return
        self.asked[name], self.tokens[name] = request, []

    def pick(self) -> str:
        return self.draw.choice(sorted(self.asked) or ["none"])

    def check(self) -> None:
        assert not self.failures
        for name, request in self.asked.items():
            expected = expected_output(
                request.tokens,
                request.max_new_tokens,
                request.sampling,
                CONFIG.eos_probability,
                stop_token_ids=request.stop_token_ids,
            )
            got = self.tokens[name]
            if name in self.cancelled:
                assert got == expected[: len(got)]
            else:
                assert name in self.ended
                assert got == expected


async def session(seed: int) -> None:
    clock, draw = VirtualClock(), random.Random(seed)
    engine = SimEngine(CONFIG, clock.now)
    client = Client(engine, draw)
    await engine.start(client.on_step, client.failures.append)
    held: list[PageExport | PageImport] = []
    for _ in range(120):
        action = draw.randrange(12)
        if action < 4:
            client.submit()
        elif action == 4:
            engine.park(client.pick())
        elif action == 5:
            engine.unpark(client.pick())
        elif action == 6 and draw.random() < 0.3:
            name = client.pick()
            engine.cancel(name)
            if name not in client.ended:
                client.cancelled.add(name)
        elif action == 7:
            hashes = engine.block_hashes(NAMESPACE, client.context())
            engine.pin(f"p{draw.randrange(3)}", hashes, ttl_s=draw.random())
        elif action == 8:
            engine.drop(engine.block_hashes(NAMESPACE, client.context()))
        elif action == 9:
            held.append(engine.export_pages(engine.block_hashes(NAMESPACE, client.context())))
        elif action == 10:
            held += reserve(engine, client.context())
        else:
            for _ in range(min(2, len(held))):
                held.pop(draw.randrange(len(held))).release()
        engine.check_integrity()
        await clock.sleep(draw.choice([0.0, 0.001, 0.02]))
    for pages in held:
        pages.release()
    for name in client.asked:
        engine.unpark(name)
    await clock.sleep(60)
    client.check()
    engine.check_integrity()
    assert engine.load().free_pages == CONFIG.capacity_pages
    await engine.aclose()


def reserve(engine: SimEngine, context: list[int]) -> list[PageImport]:
    hashes = engine.block_hashes(NAMESPACE, context)
    first = engine.resident_pages(hashes)
    try:
        return [engine.reserve_import(hashes, first, len(hashes) - first)]
    except PagesExhausted:
        return []


@pytest.mark.parametrize("seed", range(30))
def test_outputs_are_those_of_the_reference(seed: int) -> None:
    run(lambda: session(seed), seed)


def test_a_wrong_byte_in_any_cached_page_changes_the_output() -> None:
    async def main() -> None:
        prompt = list(range(17))
        for page in range(4):
            engine = SimEngine(CONFIG, VirtualClock().now)
            outputs: list[StepOutput] = []
            await engine.start(outputs.extend, lambda failure: None)

            async def said(
                engine: SimEngine = engine, got: list[StepOutput] = outputs
            ) -> list[int]:
                got.clear()
                engine.submit(GenerateRequest("g", prompt, NAMESPACE, Sampling(), 8))
                await anyio.sleep(1)
                return [token for output in got for token in output.tokens]

            before = await said()
            assert await said() == before
            export = engine.export_pages(engine.block_hashes(NAMESPACE, prompt))
            cached = export.view(page).obj
            assert isinstance(cached, bytearray)
            cached[cached.index(bytes(export.view(page)))] ^= 1
            export.release()
            assert await said() != before
            with pytest.raises(AssertionError, match="overwritten"):
                engine.check_integrity()

    run(main, 0)


def test_a_failing_step_is_reported_and_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no more hashes")

    async def main() -> None:
        engine = SimEngine(CONFIG, VirtualClock().now)
        outputs: list[StepOutput] = []
        failures: list[EngineFailed] = []
        await engine.start(outputs.extend, failures.append)
        engine.submit(GenerateRequest("g", [1, 2], NAMESPACE, Sampling(), 8))
        monkeypatch.setattr(Context, "compute", broken)
        await anyio.sleep(1)
        assert ["no more hashes" in str(failure) for failure in failures] == [True]
        assert not outputs
        with pytest.raises(EngineFailed):
            engine.submit(GenerateRequest("h", [1, 2], NAMESPACE, Sampling(), 8))

    run(main, 0)
