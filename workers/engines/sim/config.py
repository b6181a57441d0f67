"""Settings of the sim engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from workers.engines.port import EngineInfo
from workers.engines.sim.model import STATE_BYTES
from workers.text.byte_vocabulary import END_OF_TURN, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class SimTiming:
    """How long a step takes: a base, and a share per token."""

    step_ms: float = 4.0
    decode_token_ms: float = 0.1
    prefill_token_ms: float = 0.05
    max_prefill_tokens: int = 2048
    """Prompt tokens of one step at most."""

    def __post_init__(self) -> None:
        if self.step_ms <= 0 or self.decode_token_ms < 0 or self.prefill_token_ms < 0:
            raise ValueError("a step must take time, and tokens cannot give time back")
        if self.max_prefill_tokens < 1:
            raise ValueError("max_prefill_tokens must be at least 1")

    def step_s(self, decode_tokens: int, prefill_tokens: int) -> float:
        decode_ms = decode_tokens * self.decode_token_ms
        return (self.step_ms + decode_ms + prefill_tokens * self.prefill_token_ms) / 1000


@dataclass(frozen=True, slots=True)
class SimConfig:
    """Everything that makes one sim engine. Raises ValueError for what cannot work."""

    model: str = "sim"
    page_size: int = 16
    capacity_pages: int = 4096
    max_context_tokens: int = 32_768
    max_running: int = 32
    max_queued: int = 64
    eos_probability: float = 1 / 128
    """Chance of the end-of-turn token at each position (drawn from the hash)."""
    timing: SimTiming = field(default_factory=SimTiming)

    def __post_init__(self) -> None:
        positive = (
            self.page_size, self.capacity_pages, self.max_context_tokens, self.max_running,
        )  # fmt: skip
        if min(positive) < 1 or self.max_queued < 0:
            raise ValueError("sizes of the sim engine must be positive")
        if not 0 <= self.eos_probability < 1:
            raise ValueError("eos_probability must be in [0, 1)")

    def info(self) -> EngineInfo:
        layout = f"sim-1|{self.model}|{self.page_size}|{STATE_BYTES}"
        return EngineInfo(
            engine="sim",
            model=self.model,
            vocab_size=VOCAB_SIZE,
            max_context_tokens=self.max_context_tokens,
            page_size=self.page_size,
            capacity_pages=self.capacity_pages,
            page_bytes=self.page_size * STATE_BYTES,
            kv_fingerprint=hashlib.blake2b(layout.encode(), digest_size=16).digest(),
            max_running=self.max_running,
            max_queued=self.max_queued,
            eos_token_ids=(END_OF_TURN,),
        )
