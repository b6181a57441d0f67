"""Continues a context from KV pages in a file: ``python -m tests.support.kv_continuation FILE``.

The file is a pickled :class:`Continuation`. Writes the logits of every decoded position to standard
output, as raw float32, so that two processes can be compared bit by bit.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

from workers.engines.port import Sampling
from workers.engines.torch.config import PAGE_SIZE, TorchEngineConfig
from workers.engines.torch.runner import ModelRunner, Part
from workers.engines.torch.sampling import Draw, choose

SAMPLE_LAST = Draw(Sampling(), 0)


@dataclass(frozen=True, slots=True)
class Continuation:
    """``tokens[:len(contents) * PAGE_SIZE]`` have their KV in ``contents``; the rest is computed in
    one chunk, and ``steps`` tokens are then sampled."""

    model: str
    capacity_pages: int
    pages: tuple[int, ...]
    contents: tuple[bytes, ...]
    tokens: tuple[int, ...]
    sampling: Sampling
    steps: int

    def logits(self) -> bytes:
        """Of every sampled position, float32."""
        config = TorchEngineConfig(model=self.model, device="cpu", kv_pages=self.capacity_pages)
        runner = ModelRunner(Path(self.model), config)
        for page, content in zip(self.pages, self.contents, strict=False):
            runner.pool.write(page, memoryview(bytearray(content)))
        return decode(
            runner,
            self.tokens,
            len(self.contents) * PAGE_SIZE,
            self.pages,
            self.sampling,
            self.steps,
        )


def decode(
    runner: ModelRunner,
    tokens: tuple[int, ...],
    computed: int,
    pages: tuple[int, ...],
    sampling: Sampling,
    steps: int,
) -> bytes:
    """Logits of ``steps`` sampled positions after ``tokens``, float32."""
    context = list(tokens)
    record = b""
    for _ in range(steps):
        part = Part(tuple(context[computed:]), computed, pages, (), SAMPLE_LAST)
        row = runner.logits([part])[0]
        record += row.numpy().tobytes()
        computed = len(context)
        context.append(choose(row, Draw(sampling, len(context))))
    return record


if __name__ == "__main__":
    continuation = pickle.loads(Path(sys.argv[1]).read_bytes())
    sys.stdout.buffer.write(continuation.logits())
