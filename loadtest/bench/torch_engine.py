"""How fast the torch engine is, beside what the same machine does in the same minutes.

Everything is measured through the engine's port, in rounds that alternate engine, plain
transformers forward and bare matrix product; figures are medians over the rounds, and ratios are
medians of each round's ratio, because neighbours on a shared machine come and go.

* GEMM: float32 ``[1024, 1024] @ [1024, 1024]``, the best of a few, as the machine's peak.
* Prefill: a new prompt, from submission to its first token; its FLOP (projections, MLPs, causal
  attention, one row of logits) per second as a share of that round's GEMM peak.
* Decode: tokens/s of a batch whose contexts are cached; plain is ``model(token, past_key_values)``
  with a batch of the same contexts and transformers' own cache and SDPA.
* KV move: 2,048 tokens from one engine to another in the same process and on one thread: export,
  loopback TCP through the replica's own data channel, checksums, import. Against recomputing them.

    python -m loadtest.bench.torch_engine [--json] [--rounds 7] [--threads 1] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from workers.engines.model_store import BUNDLED_MODEL, model_folder, silence_progress_bars
from workers.engines.port import GenerateRequest, Sampling, StepOutput
from workers.engines.torch.config import TorchEngineConfig
from workers.engines.torch.engine import TorchEngine
from workers.kv.channel import KvServer, pull_pages

NAMESPACE = b"bench"
CONTEXT = 512
"""Tokens of a context that is decoded from."""
DECODED = 12
"""Tokens that each generation of a measured batch decodes."""
PLAIN_BATCHES = (1, 4)
BATCHES = (1, 4, 16)
PROMPTS = (512, 2048)
MOVED = 2048
WARM_UP_ROUNDS = 1


class Driver:
    """A started engine, and the times of its outputs."""

    def __init__(self, engine: TorchEngine, seed: int) -> None:
        self.engine = engine
        self._random = random.Random(seed)
        self._ids = 0
        self._left = 0
        self._done = anyio.Event()
        self._steps: list[tuple[float, int]] = []

    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        self._steps.append((time.perf_counter(), sum(len(o.tokens) for o in outputs)))
        self._left -= sum(o.finish is not None or o.error is not None for o in outputs)
        if self._left == 0:
            self._done.set()

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(3, self.engine.info.vocab_size) for _ in range(length)]

    async def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[float, int]]:
        """Generates from all prompts at once. Returns when each step ended, and its tokens."""
        self._steps, self._left, self._done = [], len(prompts), anyio.Event()
        for prompt in prompts:
            self._ids += 1
            self.engine.submit(
                GenerateRequest(f"g{self._ids}", prompt, NAMESPACE, Sampling(), tokens)
            )
        await self._done.wait()
        return self._steps


@asynccontextmanager
async def engine(config: TorchEngineConfig, seed: int) -> AsyncIterator[Driver]:
    """A started engine; failures of its steps end the benchmark."""
    it = TorchEngine(config, time.monotonic)
    driver = Driver(it, seed)

    def failed(failure: Exception) -> None:
        raise failure

    await it.start(driver.on_step, failed)
    try:
        yield driver
    finally:
        await it.aclose()


@dataclass(slots=True)
class Series:
    """Named figures, one per round."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> float:
        self.figures.setdefault(name, []).append(value)
        return value

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(v), 3) for name, v in self.figures.items()}


class Plain:
    """The same model in transformers, without an engine."""

    def __init__(self, folder: str) -> None:
        silence_progress_bars()
        models: Any = AutoModelForCausalLM
        self._model = models.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        self._model(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def decode_rate(self, cache: DynamicCache, batch: int, tokens: int) -> float:
        """Tokens/s of the batch; the cache is left as it was."""
        chosen = torch.zeros((batch, 1), dtype=torch.int64)
        times = []
        for _ in range(tokens):
            began = time.perf_counter()
            logits = self._model(chosen, past_key_values=cache).logits[:, -1]
            chosen = logits.argmax(-1, keepdim=True)
            times.append(time.perf_counter() - began)
        cache.crop(-tokens)
        return batch / statistics.median(times)

    def flop(self, tokens: int) -> float:
        """Of prefilling so many tokens and computing one row of logits."""
        config = self._model.config
        head: int = config.vocab_size * config.hidden_size
        layers = self._model.model.layers
        weights: int = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        attention: int = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 2.0 * weights * tokens + attention * tokens**2 + 2.0 * head


def gemm_gflops(size: int = 1024, repeats: int = 5) -> float:
    """The best of a few products, GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return max(2 * size**3 / _seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


async def measure(config: TorchEngineConfig, rounds: int) -> dict[str, Any]:
    """All figures, medians over the rounds."""
    torch.set_num_threads(config.threads)
    plain = Plain(config.model)
    series = Series()
    async with engine(config, 1) as source, engine(config, 2) as target:
        contexts = [source.prompt(CONTEXT) for _ in range(max(BATCHES))]
        await source.run(contexts, 1)  # caches them
        caches = {batch: plain.prefill(contexts[:batch]) for batch in PLAIN_BATCHES}
        for index in range(WARM_UP_ROUNDS + rounds):
            if index == WARM_UP_ROUNDS:
                series = Series()
            began = time.perf_counter()
            await _round(series, source, target, plain, contexts, caches)
            took = time.perf_counter() - began
            sys.stderr.write(f"round {index} of {rounds} took {took:.0f} s: {series.medians()}\n")
        info = source.engine.info
    return {
        "model": info.model,
        "threads": config.threads,
        "rounds": rounds,
        "context_tokens": CONTEXT,
        "moved_bytes": MOVED // info.page_size * info.page_bytes,
        "max_prefill_tokens_per_step": config.max_prefill_tokens_per_step,
        **series.medians(),
    }


async def _round(
    series: Series,
    source: Driver,
    target: Driver,
    plain: Plain,
    contexts: Sequence[Sequence[int]],
    caches: dict[int, DynamicCache],
) -> None:
    rates: dict[int, float] = {}
    for batch in BATCHES:
        rates[batch] = await _decode_rate(source, contexts[:batch])
        series.add(f"decode_batch_{batch}_tokens_per_s", rates[batch])
        if batch in caches:
            beside = plain.decode_rate(caches[batch], batch, DECODED)
            series.add(f"plain_batch_{batch}_tokens_per_s", beside)
            series.add(f"decode_batch_{batch}_vs_plain", rates[batch] / beside)
    for batch in BATCHES[1:]:
        series.add(f"decode_batch_{batch}_vs_1", rates[batch] / rates[1])
    for length in PROMPTS:
        peak = gemm_gflops()
        prompt = source.prompt(length)
        began = time.perf_counter()
        steps = await source.run([prompt], 1)
        seconds = steps[-1][0] - began
        peak = series.add("gemm_gflops", statistics.mean([peak, gemm_gflops()]))
        series.add(f"prefill_{length}_tokens_per_s", length / seconds)
        series.add(f"prefill_{length}_vs_gemm", plain.flop(length) / seconds / 1e9 / peak)
    await _move(series, source, target)


async def _decode_rate(driver: Driver, prompts: Sequence[Sequence[int]]) -> float:
    """Tokens/s over the steps in which every generation got a token."""
    steps = await driver.run(prompts, DECODED)
    full = [at for at, tokens in steps if tokens == len(prompts)]
    return len(prompts) / statistics.median(b - a for a, b in itertools.pairwise(full))


async def _move(series: Series, source: Driver, target: Driver) -> None:
    """The KV of a new context from source to target, and the same context recomputed."""
    prompt = source.prompt(MOVED)
    began = time.perf_counter()
    await source.run([prompt], 1)
    recompute_s = time.perf_counter() - began
    hashes = source.engine.block_hashes(NAMESPACE, prompt)
    async with anyio.create_task_group() as tasks:
        server = KvServer("127.0.0.1", 0)
        await tasks.start(server.serve)
        began = time.perf_counter()
        incoming = target.engine.reserve_import(hashes, 0, len(hashes))
        export = source.engine.export_pages(hashes)
        metas = list(export.pages)
        ticket = server.issue_ticket(export, 60.0)
        page_bytes = target.engine.info.page_bytes
        await pull_pages(server.endpoint, ticket, incoming, len(metas), page_bytes, 60.0)
        pulled_at = time.perf_counter()
        taken = await incoming.commit(metas)
        done_at = time.perf_counter()
        tasks.cancel_scope.cancel()
    if taken != len(hashes):
        raise RuntimeError(f"{taken} of {len(hashes)} pages arrived")
    series.add("move_2048_ms", 1e3 * (done_at - began))
    series.add("move_commit_ms", 1e3 * (done_at - pulled_at))
    series.add("recompute_2048_ms", 1e3 * recompute_s)
    series.add("recompute_vs_move", recompute_s / (done_at - began))
    began = time.perf_counter()
    await target.run([[*prompt, 1]], 1)
    series.add("first_token_after_move_ms", 1e3 * (time.perf_counter() - began))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    """The command line; prints the figures."""
    parser = argparse.ArgumentParser(description="Measure the torch engine.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    options = parser.parse_args()
    config = TorchEngineConfig(
        model=str(model_folder(options.model)), device="cpu", threads=options.threads
    )
    figures = anyio.run(measure, config, options.rounds)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    else:
        for name, value in figures.items():
            sys.stdout.write(f"{name:34} {value}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
