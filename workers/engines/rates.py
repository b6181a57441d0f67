"""Measured speed of an engine, smoothed."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.2
"""Of a new measurement in the moving averages."""
LEAST_SHARE = 0.1
"""Of a mixed step's time that is put down to its prefill, however slow decoding seemed before."""


@dataclass(slots=True)
class StepRates:
    """Tokens/s, 0.0 until measured: of prefill alone, and of one generation's decoding in the
    batches of late."""

    prefill: float = 0.0
    decode: float = 0.0

    def record(self, prefill_tokens: int, decoding: bool, seconds: float) -> None:
        """Enters a step. In a mixed one, decoding is taken to have cost what it does alone."""
        if seconds <= 0.0:
            return
        if not prefill_tokens:
            self.decode = _smoothed(self.decode, 1.0 / seconds)
            return
        expected = 1.0 / self.decode if decoding and self.decode else 0.0
        prefilling = max(seconds - expected, LEAST_SHARE * seconds)
        self.prefill = _smoothed(self.prefill, prefill_tokens / prefilling)


def _smoothed(before: float, value: float) -> float:
    return value if before == 0.0 else before + WEIGHT * (value - before)
