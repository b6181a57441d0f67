"""Attention over a paged KV cache, as an attention function for transformers' models.

One forward computes the new tokens of several contexts, flattened into one row: projections and
MLPs see a single matrix, and only attention looks at contexts one by one. Each context's new keys
and values are written to its pages first; then its queries attend to its pages. Query heads that
share a key-value head are folded into the query's length where one token is decoded, so keys and
values are never repeated.

After PagedAttention (Kwon et al., 2023), with the page table resolved into runs of neighbouring
pages: one run is read in place, several are copied into a workspace that stays in the CPU's cache.
Either way the kernel sees the same shapes and strides within a head, so where a context's pages
happen to lie does not change a bit of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from workers.engines.torch.config import CHUNK_ALIGNMENT
from workers.engines.torch.kv_pool import KvPool, page_runs, slots

ATTENTION_NAME = "sessile_paged"
QUERY_BLOCK = CHUNK_ALIGNMENT
UNSUPPORTED = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments of attention variants that would silently be wrong here."""


@dataclass(frozen=True, slots=True)
class Span:
    """One context's share of a step: ``count`` new tokens from position ``start`` on, at ``offset``
    in the flattened row; ``pages`` hold positions 0 to ``start + count``, and may go on."""

    offset: int
    start: int
    count: int
    pages: Sequence[int]

    @property
    def context(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class PagedStep:
    """What attention has to know of a step; the same for all layers."""

    pool: KvPool
    spans: Sequence[Span]
    _slots: torch.Tensor = field(init=False)
    _runs: list[list[tuple[int, int]]] = field(init=False)
    _mask: torch.Tensor = field(init=False)
    _workspace: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer = self.pool.layers[0]
        _, heads, _, page_size, head_dim = layer.shape
        where: list[int] = []
        used: list[Sequence[int]] = []
        for span in self.spans:
            where += slots(span.pages, range(span.start, span.context), page_size)
            used.append(span.pages[: -(-span.context // page_size)])
        self._slots = torch.tensor(where, dtype=torch.int64, device=layer.device)
        self._runs = [page_runs(pages) for pages in used]
        widest = max((span.context for span in self.spans if span.count > 1), default=0)
        mask = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=layer.dtype).triu_(1)
        self._mask = F.pad(mask, (widest - QUERY_BLOCK, 0)).to(layer.device)
        scattered = [len(p) for p, runs in zip(used, self._runs, strict=True) if len(runs) > 1]
        size = 2 * heads * page_size * head_dim * max(scattered, default=0)
        self._workspace = torch.empty(size, dtype=layer.dtype, device=layer.device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Writes ``key`` and ``value`` ``[kv_heads, tokens, head_dim]`` to the pages. Returns
        the attention of ``query`` ``[heads, tokens, head_dim]``: ``[tokens, heads, head_dim]``."""
        pool = self.pool.layers[layer]
        flat = pool.flatten(2, 3)
        flat[0].index_copy_(1, self._slots, key)
        flat[1].index_copy_(1, self._slots, value)
        heads, tokens, head_dim = query.shape
        kv_heads = key.shape[0]
        out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
        for span, runs in zip(self.spans, self._runs, strict=True):
            keys, values = self._context(pool, runs, span.context)
            if span.count == 1:
                # The heads of a group see the same keys: one short matrix instead of a repeat.
                q = query[:, span.offset].view(1, kv_heads, heads // kv_heads, head_dim)
                result = F.scaled_dot_product_attention(q, keys, values, scale=scaling)
                out[span.offset] = result.view(heads, head_dim)
            else:
                self._attend_chunk(span, query, keys, values, scaling, out)
        return out

    def _attend_chunk(
        self,
        span: Span,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of a chunk's tokens, in blocks between absolute positions, each over the keys
        up to its end. So no arithmetic depends on how a context was cut into chunks, and most of
        what causality forbids is never computed."""
        widest = self._mask.shape[1]
        start = span.start
        while start < span.context:
            end = min(span.context, start - start % QUERY_BLOCK + QUERY_BLOCK)
            rows = slice(span.offset + start - span.start, span.offset + end - span.start)
            result = F.scaled_dot_product_attention(
                query[None, :, rows],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=self._mask[QUERY_BLOCK - (end - start) :, widest - end :],
                scale=scaling,
                enable_gqa=query.shape[0] != keys.shape[1],
            )
            out[rows] = result[0].transpose(0, 1)
            start = end

    def _context(
        self, pool: torch.Tensor, runs: Sequence[tuple[int, int]], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one context, each ``[1, kv_heads, length, head_dim]``."""
        if len(runs) == 1:
            first, count = runs[0]
            together = pool.narrow(2, first, count)
        else:
            count = sum(count for _, count in runs)
            shape = (2, pool.shape[1], count, *pool.shape[3:])
            together = self._workspace[: 2 * pool[0, :, :count].numel()].view(shape)
            torch.cat([pool.narrow(2, first, n) for first, n in runs], dim=2, out=together)
        together = together.flatten(2, 3)[:, None, :, :length]
        return together[0], together[1]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    paged_step: PagedStep,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; ``paged_step`` comes through the forward's arguments."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the torch engine has no attention with {name}")
    layer = module.layer_idx
    assert isinstance(layer, int)
    return paged_step.attend(layer, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
