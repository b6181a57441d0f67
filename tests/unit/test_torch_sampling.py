"""Sampling is a draw from the right distribution, and a pure function of seed and position."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from workers.engines.port import Sampling  # noqa: E402
from workers.engines.torch.sampling import (  # noqa: E402
    NUCLEUS_CANDIDATES,
    Draw,
    choose,
    gumbel_noise,
)

pytestmark = pytest.mark.model

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0


def draws(sampling: Sampling, count: int, banned: frozenset[int] = frozenset()) -> Counter[int]:
    return Counter(
        choose(LOGITS.clone(), Draw(sampling, position, banned)) for position in range(count)
    )


def test_greedy_takes_the_largest_that_is_not_banned() -> None:
    assert set(draws(Sampling(), 1)) == {0}
    assert set(draws(Sampling(), 1, frozenset({0, 1, 99_999}))) == {2}


def test_draws_follow_the_softmax() -> None:
    counts = draws(Sampling(temperature=1.0, seed=5), 4000)
    for token, probability in enumerate(PROBABILITIES):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens() -> None:
    squared = [p * p for p in PROBABILITIES]
    counts = draws(Sampling(temperature=0.5, seed=6), 4000)
    for token, weight in enumerate(squared):
        assert counts[token] / 4000 == pytest.approx(weight / sum(squared), abs=0.03)


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    assert set(draws(Sampling(temperature=1.0, top_k=2), 300)) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.69), 300)) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.71), 300)) == {0, 1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=1e-9), 300)) == {0}
    # top-p counts among what top-k left: 0.4 / 0.7 is enough for 0.5.
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, top_k=2), 300)) == {0}


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    flat = torch.zeros(4 * NUCLEUS_CANDIDATES)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    seen = {choose(flat.clone(), Draw(sampling, position)) for position in range(400)}
    assert len(seen) > 300


def test_noise_is_a_function_of_seed_and_position() -> None:
    noise = gumbel_noise(7, 1000, 64)
    assert torch.equal(noise, gumbel_noise(7, 1000, 64))
    assert torch.equal(noise[:16], gumbel_noise(7, 1000, 16)), "by token, whatever the vocabulary"
    assert not torch.equal(noise, gumbel_noise(8, 1000, 64))
    assert bool(noise.isfinite().all())


def test_positions_share_no_noise() -> None:
    """A position that were only an offset into one stream would repeat its neighbour's numbers."""
    first, second = set(gumbel_noise(7, 4, 256).tolist()), set(gumbel_noise(7, 5, 256).tolist())
    assert first.isdisjoint(second)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_any_64_bit_seed_will_do(seed: int) -> None:
    choose(LOGITS.clone(), Draw(Sampling(temperature=1.0, seed=seed), 2**40))
