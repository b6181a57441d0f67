"""Fault schedules as data: drawn from a seed, left out one by one while what remains fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_FAULTS = 40
"""Of one history."""
FAULTS_PER_S = (0.5, 2.0)
"""Least and most, all kinds together."""
WEIGHTS = (0.3, 1.0, 3.0)
"""How often an enabled kind comes, against the others."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: when it begins, and the seed of everything that is drawn for it, so that leaving
    one out changes none of the others."""

    at_s: float
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"Fault({self.at_s:.3f}, {self.kind!r}, {self.seed})"


def draw_kinds(draw: random.Random, kinds: Sequence[str]) -> tuple[str, ...]:
    """Swarm testing: most histories have only some kinds, because rare combinations are reached by
    leaving the others out."""
    return tuple(draw.sample(sorted(kinds), draw.randrange(1, len(kinds) + 1)))


def draw_schedule(draw: random.Random, kinds: Sequence[str], within_s: float) -> tuple[Fault, ...]:
    """Faults of these kinds, each kind at a rate of its own."""
    kinds = sorted(kinds)
    weights = [draw.choice(WEIGHTS) for _ in kinds]
    rate, at_s = draw.uniform(*FAULTS_PER_S), 0.0
    faults: list[Fault] = []
    while len(faults) < MAX_FAULTS:
        at_s += draw.expovariate(rate)
        if at_s >= within_s:
            break
        faults.append(Fault(at_s, draw.choices(kinds, weights)[0], draw.getrandbits(32)))
    return tuple(faults)


def minimise(
    schedule: Sequence[Fault], fails: Callable[[Sequence[Fault]], bool], max_runs: int
) -> tuple[Fault, ...]:
    """The smallest schedule found within ``max_runs`` for which ``fails`` still holds: delta
    debugging (Zeller, Hildebrandt 2002), leaving out ever smaller parts."""
    left, parts, runs = list(schedule), 2, 0
    if fails(()):
        return ()
    while len(left) >= 2:
        size = -(-len(left) // parts)
        for start in range(0, len(left), size):
            if runs >= max_runs:
                return tuple(left)
            runs += 1
            rest = left[:start] + left[start + size :]
            if fails(rest):
                left, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(left):
                break
            parts = min(2 * parts, len(left))
    return tuple(left)
