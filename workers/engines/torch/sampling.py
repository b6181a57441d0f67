"""Choosing a token. The noise is a pure function of (seed, position).

Sampling is the Gumbel-max trick: the largest ``logit / temperature + noise`` is a draw from the
softmax. The noise comes from the counter-based generator Philox (Salmon et al., 2011), keyed by the
seed and with the ledger position in a high word of its counter, so that positions never share
numbers. A generation that is continued elsewhere draws what it would have drawn here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from workers.engines.port import Sampling

NUCLEUS_CANDIDATES = 512
"""Tokens that are ranked at first for top-p; all of them only if these do not reach it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the token for ledger position ``position`` is chosen; ``banned`` tokens never are."""

    sampling: Sampling
    position: int
    banned: frozenset[int] = frozenset()


def choose(logits: torch.Tensor, draw: Draw) -> int:
    """A token id. ``logits`` is ``[vocabulary]``, float32 on the CPU, and may be changed."""
    if draw.banned:
        logits[_in_range(draw.banned, len(logits))] = float("-inf")
    sampling = draw.sampling
    if sampling.temperature <= 0.0:
        return int(logits.argmax())
    logits = logits.double() / sampling.temperature
    kept = _kept(logits, sampling)
    noise = gumbel_noise(sampling.seed, draw.position, len(logits))
    if kept is None:
        return int((logits + noise).argmax())
    return int(kept[(logits[kept] + noise[kept]).argmax()])


def gumbel_noise(seed: int, position: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise, float64, by token id."""
    bits = np.random.Philox(
        key=seed % 2**128, counter=np.array([0, position, 0, 0], dtype=np.uint64)
    )
    uniform = np.random.Generator(bits).random(size)
    np.maximum(uniform, np.finfo(np.float64).tiny, out=uniform)  # a draw of 0 has no logarithm
    return torch.from_numpy(-np.log(-np.log(uniform)))


def _kept(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    """Token ids that top-k and then top-p leave, or None for all of them."""
    size = len(logits)
    top_k = sampling.top_k if 0 < sampling.top_k < size else size
    if sampling.top_p >= 1.0:
        return None if top_k == size else logits.topk(top_k).indices
    ranked = logits.topk(min(top_k, NUCLEUS_CANDIDATES))
    # Probabilities among the top-k tokens; with no top-k, among all.
    base = logits if top_k == size else logits.topk(top_k).values
    total = base.logsumexp(0)
    if float((ranked.values.logsumexp(0) - total).exp()) < sampling.top_p:
        ranked = logits.topk(top_k)
    below = (ranked.values - total).exp().cumsum(0).roll(1)
    below[0] = 0.0  # the first token always stays
    return ranked.indices[below < sampling.top_p]


def _in_range(tokens: Iterable[int], size: int) -> list[int]:
    return [token for token in tokens if 0 <= token < size]
