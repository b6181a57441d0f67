"""A random Llama of a few kilobytes: everything but sense that a real model has."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

VOCAB_SIZE = 320


@functools.cache
def tiny_llama(seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Path:
    """Its folder, made once per process and removed when the process ends."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from workers.engines.model_store import silence_progress_bars

    silence_progress_bars()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # spreads the logits, so that greedy choices are clear
    )
    folder = Path(_scratch().name) / f"tiny-llama-{seed}-{vocab_size}"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sessile-tiny-", ignore_cleanup_errors=True)
