"""Runs one step of the model: new tokens of several contexts in, sampled tokens out.

Model definitions come from transformers: any causal language model with full attention that goes
through its attention interface. Everything here happens on the engine's own thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.engines.model_store import silence_progress_bars, weights_digest
from workers.engines.port import EngineFailed, Sampling
from workers.engines.torch.attention import ATTENTION_NAME, PagedStep, Span
from workers.engines.torch.config import PAGE_SIZE, TorchEngineConfig
from workers.engines.torch.kv_pool import LAYOUT_VERSION, KvPool
from workers.engines.torch.packed_linear import pack_linear_layers
from workers.engines.torch.sampling import Draw, choose
from workers.kv.pages import checksum


class UnsupportedModel(EngineFailed):
    """The model cannot be loaded, or needs attention that this engine does not have."""


@dataclass(frozen=True, slots=True)
class Part:
    """One context's share of a step. ``pages`` hold positions 0 to ``start + len(tokens)``;
    ``filled`` are those that are full after the step; a token is sampled after the last new one
    if ``draw`` is given."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    filled: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class PartResult:
    """The sampled token if one was asked for, and the checksums of the filled pages by page."""

    token: int | None
    checksums: dict[int, int]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results in the order of the step's parts."""

    parts: tuple[PartResult, ...]
    seconds: float
    """Time of the whole step."""


class ModelRunner:
    """A model and its page pool. Loading takes seconds; raises UnsupportedModel."""

    def __init__(self, folder: Path, config: TorchEngineConfig) -> None:
        silence_progress_bars()
        torch.set_num_threads(config.threads)
        self.model_config = _loaded(folder, AutoConfig.from_pretrained, folder)
        _refuse_partial_attention(self.model_config)
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        # bfloat16 arithmetic is about three times slower than float32 on common CPUs.
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self._model: Any = _model(folder, self.dtype)
        self._model.to(self.device).eval()
        if not cuda:
            pack_linear_layers(self._model)
        self.pool = KvPool(
            **self._kv_shape(),
            pages=config.kv_pages or self._pages_in(config.kv_memory_mb * 2**20),
            page_size=PAGE_SIZE,
            dtype=self.dtype,
            device=self.device,
        )
        self.capacity_pages: int = self.pool.layers[0].shape[2]
        self.kv_fingerprint = _kv_fingerprint(folder, self.model_config, self.dtype)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """As the model's generation settings have them."""
        eos = self._model.generation_config.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)

    @property
    def vocab_size(self) -> int:
        return int(self.model_config.vocab_size)

    @property
    def max_context_tokens(self) -> int:
        return int(self.model_config.max_position_embeddings)

    def warm_up(self) -> None:
        """One prefill and one decode, so that the first request does not pay for set-up. Leaves
        garbage in the first page."""
        greedy = Draw(Sampling(), 0)
        self.step([Part((0,) * (PAGE_SIZE - 1), 0, (0,), (), None)])
        self.step([Part((0,), PAGE_SIZE - 1, (0,), (0,), greedy)])

    @torch.inference_mode()
    def step(self, parts: Sequence[Part]) -> StepResult:
        """One forward over the new tokens of all parts. Writes their KV pages."""
        began = time.perf_counter()
        draws = [part.draw for part in parts if part.draw is not None]
        logits = self.logits(parts)
        tokens = iter([choose(row, draw) for row, draw in zip(logits, draws, strict=True)])
        results = tuple(
            PartResult(
                None if part.draw is None else next(tokens),
                {page: checksum(self.pool.read(page)) for page in part.filled},
            )
            for part in parts
        )
        return StepResult(results, time.perf_counter() - began)

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """``[parts that sample, vocabulary]``, float32 on the CPU. Writes the parts' KV pages."""
        spans: list[Span] = []
        row: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        for part in parts:
            spans.append(Span(len(row), part.start, len(part.tokens), part.pages))
            row += part.tokens
            positions += range(part.start, part.start + len(part.tokens))
            if part.draw is not None:
                sampled.append(len(row) - 1)
        step = PagedStep(self.pool, spans)
        hidden = self._model.base_model(
            input_ids=self._row(row),
            position_ids=self._row(positions),
            use_cache=False,
            paged_step=step,
        ).last_hidden_state[0]
        if not sampled:
            return torch.empty((0, 0))
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden[sampled])
        return logits.to(device="cpu", dtype=torch.float32)

    def _row(self, values: list[int]) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.int64, device=self.device)

    def _kv_shape(self) -> dict[str, int]:
        config = self.model_config
        heads = int(config.num_attention_heads)
        return {
            "layers": int(config.num_hidden_layers),
            "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        }

    def _pages_in(self, memory: int) -> int:
        shape = self._kv_shape()
        page = 2 * PAGE_SIZE * self.dtype.itemsize
        for size in shape.values():
            page *= size
        return max(1, memory // page)


def _loaded(folder: Path, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:  # many libraries read the folder
        raise UnsupportedModel(f"the model in {folder} cannot be loaded: {error}") from error


def _model(folder: Path, dtype: torch.dtype) -> Any:
    """The model with every weight from the folder: transformers draws missing ones at random."""
    load: Any = AutoModelForCausalLM.from_pretrained  # its annotations do not know what it returns
    model, info = _loaded(
        folder,
        load,
        folder,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        ignore_mismatched_sizes=True,  # they are told below, with the missing ones
        output_loading_info=True,
    )
    wrong = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        raise UnsupportedModel(
            f"the weights in {folder} are not those of its config.json: {len(wrong)} are missing "
            f"or of another shape, {wrong[0]} first"
        )
    return model


def _refuse_partial_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise UnsupportedModel(
            f"{config.model_type} has layers with {', '.join(sorted(kinds))}; "
            "the torch engine runs models with full attention in every layer"
        )


def _kv_fingerprint(folder: Path, config: Any, dtype: torch.dtype) -> bytes:
    """Over what makes KV pages exchangeable: weights, architecture, dtype, page size, layout."""
    incidental = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    architecture = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in incidental
    }
    facts = [architecture, weights_digest(folder), str(dtype), PAGE_SIZE, LAYOUT_VERSION]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv-fingerprint").digest()
