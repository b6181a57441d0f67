"""The torch engine's arithmetic: what a step computes is what the plain model computes, and bits
depend only on what they are promised to depend on."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.kv_continuation import SAMPLE_LAST, Continuation, decode
from tests.support.tiny_llama import VOCAB_SIZE, tiny_llama
from workers.engines.port import Sampling
from workers.engines.torch.config import PAGE_SIZE, TorchEngineConfig
from workers.engines.torch.runner import ModelRunner, Part, UnsupportedModel
from workers.kv.pages import checksum

pytestmark = pytest.mark.model

CAPACITY = 128
TOLERANCE = 1e-4
"""Of float32 logits of about 10, after sums in another order."""


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    config = TorchEngineConfig(model=str(tiny_llama()), device="cpu", kv_pages=CAPACITY)
    return ModelRunner(tiny_llama(), config)


@torch.inference_mode()
def plain_logits(tokens: list[int]) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama(), attn_implementation="eager")
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def context(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]


def part(tokens: list[int], start: int, end: int, pages: list[int]) -> Part:
    return Part(tuple(tokens[start:end]), start, tuple(pages), (), SAMPLE_LAST)


def prefill(
    runner: ModelRunner, tokens: list[int], pages: list[int], chunk: int, start: int = 0
) -> torch.Tensor:
    """Logits after the last token, computed in chunks that end at multiples of ``chunk``."""
    while True:
        end = min(len(tokens), start - start % chunk + chunk)
        logits = runner.logits([part(tokens, start, end, pages)])[0]
        if end == len(tokens):
            return logits
        start = end


def in_order(first: int, tokens: list[int]) -> list[int]:
    return list(range(first, first - (-len(tokens) // PAGE_SIZE)))


def scattered(seed: int, tokens: list[int]) -> list[int]:
    return random.Random(seed).sample(range(CAPACITY), -(-len(tokens) // PAGE_SIZE))


@pytest.mark.parametrize("length", [1, 5, 16, 63, 64, 65, 200])
def test_prefill_gives_the_plain_models_logits(runner: ModelRunner, length: int) -> None:
    tokens = context(length, length)
    logits = prefill(runner, tokens, scattered(1, tokens), 4096)
    torch.testing.assert_close(logits, plain_logits(tokens)[-1], rtol=0, atol=TOLERANCE)


def test_decoding_gives_the_plain_models_logits(runner: ModelRunner) -> None:
    tokens = context(1, 40)
    pages = scattered(2, tokens)
    expected = plain_logits(tokens)
    prefill(runner, tokens[:21], pages, 64)
    for end in range(22, 41):
        logits = runner.logits([part(tokens, end - 1, end, pages)])[0]
        torch.testing.assert_close(logits, expected[end - 1], rtol=0, atol=TOLERANCE)


def test_contexts_that_share_a_step_do_not_mix(runner: ModelRunner) -> None:
    """Prefills that begin and that go on, and decoding, in one forward."""
    lengths = [(0, 30), (64, 130), (33, 34), (0, 1), (16, 80), (99, 100)]
    contexts = [context(seed, end) for seed, (_, end) in enumerate(lengths)]
    free = iter(random.Random(3).sample(range(CAPACITY), CAPACITY))
    parts = []
    for tokens, (start, end) in zip(contexts, lengths, strict=True):
        pages = [next(free) for _ in range(-(-end // PAGE_SIZE))]
        if start:
            runner.logits([part(tokens, 0, start, pages)])
        parts.append(part(tokens, start, end, pages))
    for logits, tokens in zip(runner.logits(parts), contexts, strict=True):
        torch.testing.assert_close(logits, plain_logits(tokens)[-1], rtol=0, atol=TOLERANCE)


def test_only_positions_that_sample_have_logits(runner: ModelRunner) -> None:
    tokens = context(1, 10)
    silent = Part(tuple(tokens), 0, (0,), (), None)
    assert len(runner.logits([silent])) == 0
    assert len(runner.logits([silent, part(tokens, 0, 10, [1])])) == 1


def test_chunks_with_aligned_edges_give_the_same_bits(runner: ModelRunner) -> None:
    tokens = context(5, 300)
    whole = prefill(runner, tokens, in_order(0, tokens), 4096)
    for chunk in (64, 128, 256):
        assert torch.equal(prefill(runner, tokens, in_order(0, tokens), chunk), whole)


def test_where_pages_lie_does_not_change_a_bit(runner: ModelRunner) -> None:
    tokens = context(6, 150)
    expected = None
    for pages in (in_order(0, tokens), in_order(90, tokens), scattered(1, tokens)):
        prefill(runner, tokens[:140], pages, 64)
        rows = [runner.logits([part(tokens, n - 1, n, pages)])[0] for n in range(141, 151)]
        bits = torch.stack(rows)
        assert expected is None or torch.equal(bits, expected)
        expected = bits


def test_a_reused_prefix_gives_what_recomputing_gives(runner: ModelRunner) -> None:
    """Pages of a context that was decoded, not prefilled, and an edge that is not aligned."""
    tokens = context(7, 180)
    pages = scattered(4, tokens)
    prefill(runner, tokens[:100], pages, 64)
    for end in range(101, 161):
        runner.logits([part(tokens, end - 1, end, pages)])
    warm = prefill(runner, tokens, pages, 64, start=9 * PAGE_SIZE)
    cold = prefill(runner, tokens, scattered(5, tokens), 64)
    torch.testing.assert_close(warm, cold, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=7)]
)
def test_pages_moved_to_another_process_continue_bit_by_bit(
    runner: ModelRunner, sampling: Sampling, tmp_path: Path
) -> None:
    tokens = context(8, 5 * PAGE_SIZE + 3)
    pages = in_order(40, tokens)
    prefill(runner, tokens, pages, 64)
    moved = 5
    contents = tuple(bytes(runner.pool.read(page)) for page in pages[:moved])
    here = decode(runner, tuple(tokens), moved * PAGE_SIZE, tuple(pages), sampling, 10)
    elsewhere = Continuation(
        model=str(tiny_llama()),
        capacity_pages=32,
        pages=tuple(random.Random(9).sample(range(32), len(pages))),
        contents=contents,
        tokens=tuple(tokens),
        sampling=sampling,
        steps=10,
    )
    file = tmp_path / "continuation"
    file.write_bytes(pickle.dumps(elsewhere))
    command = [sys.executable, "-m", "tests.support.kv_continuation", str(file)]
    there = subprocess.run(
        command, check=True, capture_output=True, timeout=100, cwd=Path(__file__).parents[2]
    ).stdout
    assert len(there) == 10 * VOCAB_SIZE * 4
    assert there == here


def test_pages_survive_the_wire_unchanged(runner: ModelRunner) -> None:
    tokens = context(9, 2 * PAGE_SIZE)
    prefill(runner, tokens, [3, 7], 64)
    pool = runner.pool
    page = pool.read(7)
    assert page.readonly
    assert len(page) == pool.page_bytes
    pool.write(11, memoryview(bytearray(page)))
    assert pool.read(11) == page
    assert checksum(pool.read(11)) == checksum(pool.read(7)) != checksum(pool.read(3))


def test_the_kv_fingerprint_is_of_the_weights_not_of_the_folder(
    runner: ModelRunner, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_llama().iterdir():
        os.link(file, copy / file.name)
    config = TorchEngineConfig(device="cpu", kv_pages=1)
    assert ModelRunner(copy, config).kv_fingerprint == runner.kv_fingerprint
    assert ModelRunner(tiny_llama(1), config).kv_fingerprint != runner.kv_fingerprint


def test_a_model_with_partial_attention_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises((UnsupportedModel, NotImplementedError), match="sliding"):
        ModelRunner(tmp_path, TorchEngineConfig(device="cpu", kv_pages=4)).warm_up()


def test_packed_layers_compute_what_plain_ones_do() -> None:
    from workers.engines.torch.packed_linear import PackedLinear, pack_linear_layers

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(512, 640), torch.nn.Linear(640, 32))
    plain = [model[0], model[1]]
    with torch.inference_mode():
        assert pack_linear_layers(model) == 1
        assert isinstance(model[0], PackedLinear)
        assert model[1] is plain[1], "too small to gain"
        rows = torch.randn(1, 70, 512)
        whole = model[0](rows)
        torch.testing.assert_close(whole, plain[0](rows), rtol=0, atol=1e-5)
        for count in (4, 16, 64):
            assert torch.equal(model[0](rows[:, :count]), whole[:, :count])
