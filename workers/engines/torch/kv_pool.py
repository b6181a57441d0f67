"""The memory behind the KV pages, and a page's form on the wire.

The pool is one tensor ``[layers, 2 (K, V), kv_heads, pages, page_size, head_dim]``. With the pages
inside the heads, neighbouring pages are one piece of memory per head, so a context whose pages are
in runs is read in place or copied in a few large pieces. On the wire a page is contiguous:
``[layers, 2, kv_heads, page_size, head_dim]`` in the pool's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

LAYOUT_VERSION = 1
"""Of a page on the wire; part of the KV fingerprint."""


class KvPool:
    """Fixed memory for ``pages`` pages (a :class:`workers.kv.pages.PageMemory`). Which page holds
    what is not known here."""

    blocking = True

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, kv_heads, pages, page_size, head_dim)
        # Zeros come from fresh kernel pages: untouched KV pages cost no memory.
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self._page_shape = (layers, 2, kv_heads, page_size, head_dim)
        self.layers = [self._data[layer] for layer in range(layers)]
        """Per layer ``[2, kv_heads, pages, page_size, head_dim]``, views of the pool."""
        self.page_bytes = math.prod(self._page_shape) * dtype.itemsize

    def read(self, page: int) -> memoryview:
        """A copy of the page in wire form (read-only)."""
        raw = self._data[:, :, :, page].contiguous().view(torch.uint8).cpu()
        return raw.reshape(-1).numpy().data.toreadonly()

    def write(self, page: int, raw: memoryview) -> None:
        """Fills the page from ``page_bytes`` bytes in wire form."""
        content = torch.frombuffer(raw, dtype=self._data.dtype)
        self._data[:, :, :, page].copy_(content.view(self._page_shape))


def page_runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """``pages`` as runs of neighbours: (first page, number of pages), in order."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


def slots(pages: Sequence[int], positions: Iterable[int], page_size: int) -> list[int]:
    """Where the positions of a context with these pages are: page * page_size + offset."""
    return [pages[p // page_size] * page_size + p % page_size for p in positions]
