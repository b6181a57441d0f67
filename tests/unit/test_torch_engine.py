"""What the torch engine does beyond the contract that all engines share."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.engines import EngineHarness, EngineSize, started
from tests.support.models import bundled_model
from tests.support.tiny_llama import tiny_llama
from workers.engines.model_store import BUNDLED_MODEL, ModelUnavailable
from workers.engines.port import EngineFailed
from workers.engines.registry import create_backend
from workers.engines.torch.config import TorchEngineConfig
from workers.engines.torch.engine import TorchEngine
from workers.engines.torch.runner import ModelRunner, Part, StepResult

pytestmark = [pytest.mark.anyio, pytest.mark.model]


async def test_greedy_output_is_the_plain_models() -> None:
    import torch
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(tiny_llama())
    async with started("torch", EngineSize(), time.monotonic) as it:
        prompts = [it.prompt(seed, 20 * seed + 3) for seed in range(4)]
        ids = [it.request(prompt, 40) for prompt in prompts]
        for prompt, generation_id in zip(prompts, ids, strict=True):
            output = await it.end_of(generation_id)
            context = torch.tensor([prompt])
            expected = model.generate(
                context,
                attention_mask=torch.ones_like(context),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert list(output.tokens) == expected[0, len(prompt) :].tolist()


async def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    async with started("torch", EngineSize(), time.monotonic) as it:
        running = it.request(it.prompt(1, 9), 400)  # more than it gets to
        await it.until(running, 2)
        before = len(it.so_far(running).tokens)
        late = it.request(it.prompt(2, 448), 1)  # seven chunks
        await it.end_of(late)
        assert len(it.so_far(running).tokens) - before >= 7


async def test_rates_are_measured() -> None:
    async with started("torch", EngineSize(), time.monotonic) as it:
        assert it.engine.load().prefill_tokens_per_s == 0.0
        await it.generate(it.prompt(1, 40), 5)
        load = it.engine.load()
        assert load.prefill_tokens_per_s > 0
        assert load.decode_tokens_per_s > 0


async def test_pages_of_a_cancelled_generation_stay_its_own_until_the_step_ends() -> None:
    async with started("torch", EngineSize(), time.monotonic) as it:
        running = it.request(it.prompt(1, 60), 60)
        other = it.request(it.prompt(2, 60), 20)
        await it.until(running, 1)  # delivered while the next step is under way
        free = it.engine.load().free_pages
        it.engine.cancel(running)
        it.engine.check_integrity()
        assert it.engine.load().free_pages == free
        await it.end_of(other)


async def test_a_failing_step_ends_the_engine_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = EngineHarness(TorchEngine(_config(tiny_llama()), time.monotonic))
    failures: list[EngineFailed] = []
    failed = anyio.Event()

    def on_failure(failure: EngineFailed) -> None:
        failures.append(failure)
        failed.set()

    await harness.engine.start(harness.on_step, on_failure)

    def step(runner: ModelRunner, parts: list[Part]) -> StepResult:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ModelRunner, "step", step)
    try:
        harness.request(harness.prompt(1, 9), 4)
        with anyio.fail_after(20):
            await failed.wait()
        with pytest.raises(EngineFailed, match="out of memory"):
            harness.request(harness.prompt(1, 9), 4)
    finally:
        await harness.engine.aclose()
    assert len(failures) == 1
    assert isinstance(failures[0].__cause__, RuntimeError)


def _broken(name: str, folder: Path) -> str:
    """A model folder with one thing wrong; what the error must say."""
    shutil.copytree(tiny_llama(), folder, dirs_exist_ok=True)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if name == "no weights":
        weights.unlink()
        return "model.safetensors"
    if name == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "cannot be loaded"
    if name == "no JSON":
        config.write_text('{"model_type": "llama"')
        return "config.json"
    settings = json.loads(config.read_text())
    settings |= {
        "missing weights": {"num_hidden_layers": 4},
        "other shapes": {"intermediate_size": 128},
        "impossible shapes": {"hidden_size": 64},
    }[name]
    config.write_text(json.dumps(settings))
    return "cannot be loaded" if name == "impossible shapes" else "missing or of another shape"


@pytest.mark.parametrize(
    "name",
    [
        "no weights",
        "cut weights",
        "no JSON",
        "missing weights",
        "other shapes",
        "impossible shapes",
    ],
)
async def test_a_model_that_cannot_be_loaded_fails_the_start(tmp_path: Path, name: str) -> None:
    told = _broken(name, tmp_path)
    engine = TorchEngine(_config(tmp_path), time.monotonic)
    with pytest.raises(EngineFailed, match=told) as failed:
        await engine.start(lambda outputs: None, lambda failure: None)
    assert str(tmp_path) in str(failed.value)
    await engine.aclose()


async def test_a_missing_model_is_named(tmp_path: Path) -> None:
    engine = TorchEngine(_config(tmp_path / "nowhere"), time.monotonic)
    with pytest.raises(ModelUnavailable, match="nowhere"):
        await engine.start(lambda outputs: None, lambda failure: None)
    await engine.aclose()


def test_contradictory_settings_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [
        {"device": "tpu"},
        {"threads": 0},
        {"max_prefill_tokens_per_step": 63},
        {"kv_pages": 0},
        {"max_context_tokens": 1},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TorchEngineConfig(**wrong)


async def test_the_bundled_model_makes_sense_and_counts_digits() -> None:
    """Through the real tokenizer and weights, as a replica hosts them."""
    bundled_model()
    from workers.text.port import ChatMessage, LastTurn, Role

    backend = create_backend("torch", {"kv_memory_mb": "64"}, time.monotonic)
    harness = EngineHarness(backend.engine)
    await harness.engine.start(harness.on_step, harness.failures.append)
    try:
        info = harness.engine.info
        assert (info.model, info.max_context_tokens) == (BUNDLED_MODEL, 8192)
        assert info.page_bytes == 16 * 46_080
        assert info.vocab_size == backend.codec.vocab_size
        assert info.eos_token_ids == backend.codec.eos_token_ids
        question = ChatMessage(Role.USER, "What is the capital of France?")
        prompt = backend.codec.render(LastTurn.NONE, [question], [])
        output = await harness.generate(prompt, 20, stop_token_ids=frozenset(info.eos_token_ids))
        text = backend.codec.folder().push(output.tokens)
        assert "The capital of France is Paris." in text
    finally:
        await harness.engine.aclose()


def _config(folder: Path) -> TorchEngineConfig:
    return TorchEngineConfig(model=str(folder), device="cpu", kv_pages=16)
