"""Sampling parameters at the edges of what may be asked for: always a token, and a lawful one."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz
from workers.engines.port import Sampling

pytestmark = pytest.mark.model
pytest.importorskip("torch")

VOCAB = 700
TEMPERATURES = (0.0, -0.0, 5e-324, 1e-310, 1e-30, 0.5, 1.0, 2.0)
TOP_P = (5e-324, 1e-310, 1e-9, 0.5, 0.999999999, 1.0)
TOP_K = (0, 1, 2, VOCAB - 1, VOCAB, VOCAB + 1, 2**31, 2**32 - 1)
SEEDS = (0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
SPREADS = (0.0, 1e-30, 1.0, 1e4, 1e30, 3e38)


@fuzz(150)
@given(seeds)
def test_any_lawful_parameters_choose_a_token_that_is_not_banned(seed: int) -> None:
    import torch

    from workers.engines.torch.sampling import Draw, choose

    draw = Hostile(seed).draw
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits = torch.randn(VOCAB, generator=generator) * draw.choice(SPREADS)
    banned = frozenset(draw.sample(range(VOCAB + 50), draw.choice((0, 1, 16))))
    sampling = Sampling(
        temperature=draw.choice(TEMPERATURES),
        top_p=draw.choice(TOP_P),
        top_k=draw.choice(TOP_K),
        seed=draw.choice(SEEDS),
    )
    position = draw.choice((0, 1, 2**31, 2**32, 2**40))
    token = choose(logits.clone(), Draw(sampling, position, banned))
    assert 0 <= token < VOCAB
    assert token not in banned
    assert token == choose(logits.clone(), Draw(sampling, position, banned))
