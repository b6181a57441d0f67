"""Settings of the torch engine."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engines.model_store import BUNDLED_MODEL

PAGE_SIZE = 16
"""Tokens in a KV page."""
CHUNK_ALIGNMENT = 64
"""Prefill chunks end at multiples of this position (or at the context's end): with equal edges the
same arithmetic runs, whatever the size of the chunks."""


@dataclass(frozen=True, slots=True)
class TorchEngineConfig:
    """Refuses contradictions when it is made (ValueError)."""

    model: str = BUNDLED_MODEL
    """The bundled model's name, or the path of a Hugging Face folder."""
    device: str = "auto"
    """``cpu`` (float32), ``cuda`` (bfloat16), or ``auto``: CUDA if there is one."""
    threads: int = 1
    """Of one forward, on the CPU. More engines than cores, times threads, is far slower."""
    kv_memory_mb: int = 1024
    """For the page pool (MiB); memory is touched as pages are first used."""
    kv_pages: int | None = None
    """Pages in the pool, instead of ``kv_memory_mb``."""
    max_running: int = 16
    """Generations that are in a batch or hold pages."""
    max_queued: int = 256
    """Generations that wait; over it ``submit`` refuses."""
    max_prefill_tokens_per_step: int = 256
    """Bounds how long a prefill holds up the tokens of running generations."""
    max_context_tokens: int | None = None
    """At most this much of what the model allows."""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is not one of auto, cpu, cuda")
        if self.max_prefill_tokens_per_step < CHUNK_ALIGNMENT:
            raise ValueError(f"max_prefill_tokens_per_step must be at least {CHUNK_ALIGNMENT}")
        for name in ("threads", "kv_memory_mb", "max_running", "max_queued"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.kv_pages is not None and self.kv_pages < 1:
            raise ValueError("kv_pages must be at least 1")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise ValueError("max_context_tokens must be at least 2")
