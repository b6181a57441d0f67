"""Engines for the contract suite, and a harness that collects what they deliver.

An engine joins the suite with an entry in ``ENGINES``.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import pytest

from workers.engines.port import (
    Engine,
    EngineFailed,
    EngineFinish,
    GenerateRequest,
    OnStep,
    Sampling,
    StepOutput,
)


@dataclass(frozen=True, slots=True)
class EngineSize:
    """What the suite asks of an engine under test."""

    capacity_pages: int = 64
    max_running: int = 8
    max_queued: int = 8
    max_context_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Output:
    """A generation as it was delivered."""

    tokens: tuple[int, ...]
    finish: EngineFinish | None
    cached_tokens: int | None
    error: str | None


class EngineHarness:
    """A started engine, and the outputs it has delivered."""

    noise = Sampling(temperature=1.0, seed=11)
    """What repeats on this engine, with noise if that does."""
    wait_s = 60.0
    """For what is expected of it, at most."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[StepOutput]] = {}
        self.failures: list[EngineFailed] = []
        self.on_output: OnStep = self.on_step
        """Told of every step; a test may put its own in front."""
        self._changed = anyio.Event()
        self._count = 0

    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        assert len({o.generation_id for o in outputs}) == len(outputs), "one output per generation"
        for output in outputs:
            self.outputs.setdefault(output.generation_id, []).append(output)
        self._changed.set()
        self._changed = anyio.Event()

    def prompt(self, seed: int, length: int) -> list[int]:
        """Arbitrary tokens that do not end a turn."""
        draw = random.Random(seed)
        return [draw.randrange(3, min(200, self.engine.info.vocab_size)) for _ in range(length)]

    def request(self, tokens: Sequence[int], max_new_tokens: int, **options: object) -> str:
        """Submits a generation and returns its id; options are fields of GenerateRequest."""
        self._count += 1
        fields: dict[str, object] = {
            "generation_id": f"g{self._count}",
            "namespace": b"tenant",
            "sampling": Sampling(),
            **options,
        }
        request = GenerateRequest(tokens=tokens, max_new_tokens=max_new_tokens, **fields)  # type: ignore[arg-type]
        self.engine.submit(request)
        return request.generation_id

    def so_far(self, generation_id: str) -> Output:
        parts = self.outputs.get(generation_id, [])
        return Output(
            tokens=tuple(token for part in parts for token in part.tokens),
            finish=parts[-1].finish if parts else None,
            cached_tokens=parts[0].cached_tokens if parts else None,
            error=parts[-1].error if parts else None,
        )

    async def until(self, generation_id: str, tokens: int) -> None:
        """Waits until a generation has delivered that many tokens."""
        await self._wait(lambda: len(self.so_far(generation_id).tokens) >= tokens)

    async def end_of(self, generation_id: str) -> Output:
        def ended() -> bool:
            output = self.so_far(generation_id)
            return output.finish is not None or output.error is not None

        await self._wait(ended)
        return self.so_far(generation_id)

    async def generate(
        self, tokens: Sequence[int], max_new_tokens: int, **options: object
    ) -> Output:
        return await self.end_of(self.request(tokens, max_new_tokens, **options))

    def hashes(self, tokens: Sequence[int], namespace: bytes = b"tenant") -> list[bytes]:
        return self.engine.block_hashes(namespace, tokens)

    async def _wait(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(self.wait_s):
            while not condition():
                assert not self.failures, self.failures
                await self._changed.wait()


MakeEngine = Callable[[EngineSize, Callable[[], float]], Engine]
"""Makes an engine that is not started. The second argument is the clock that pins expire by."""


def _sim(size: EngineSize, clock: Callable[[], float]) -> Engine:
    from workers.engines.sim.config import SimConfig, SimTiming
    from workers.engines.sim.engine import SimEngine

    config = SimConfig(
        page_size=4,
        capacity_pages=size.capacity_pages,
        max_context_tokens=size.max_context_tokens,
        max_running=size.max_running,
        max_queued=size.max_queued,
        eos_probability=0.05,
        timing=SimTiming(
            step_ms=0.01, decode_token_ms=0.0, prefill_token_ms=0.0, max_prefill_tokens=24
        ),
    )
    return SimEngine(config, clock)


def _torch(size: EngineSize, clock: Callable[[], float]) -> Engine:
    from tests.support.tiny_llama import tiny_llama
    from workers.engines.torch.config import TorchEngineConfig
    from workers.engines.torch.engine import TorchEngine

    config = TorchEngineConfig(
        model=str(tiny_llama()),
        device="cpu",
        kv_pages=size.capacity_pages,
        max_context_tokens=size.max_context_tokens,
        max_running=size.max_running,
        max_queued=size.max_queued,
        max_prefill_tokens_per_step=64,
    )
    return TorchEngine(config, clock)


ENGINES: dict[str, MakeEngine] = {"sim": _sim, "torch": _torch}
PARAMS = [pytest.param("sim"), pytest.param("torch", marks=pytest.mark.model)]


@asynccontextmanager
async def started(
    name: str, size: EngineSize, clock: Callable[[], float]
) -> AsyncIterator[EngineHarness]:
    """A started engine; its books are checked at the end."""
    harness = EngineHarness(ENGINES[name](size, clock))
    await harness.engine.start(lambda outputs: harness.on_output(outputs), harness.failures.append)
    try:
        yield harness
        harness.engine.check_integrity()
        assert not harness.failures
    finally:
        await harness.engine.aclose()
