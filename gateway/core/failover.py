"""Whether a session may be taken from its owner now (P10), and how long to wait if not.

A refused or reset connection is the peer's operating system saying that the process is gone: its
sessions are taken at once. Anything else (a time-out, a broken path) may be the observer's own
network: then a stale heartbeat is needed too. A wrong judgement costs time, never correctness,
because the store fences the old owner.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from gateway.core.machines import ReplicaState


@dataclass(frozen=True, slots=True)
class FailoverLimits:
    """Bounds of the retries, ms."""

    backoff_base_ms: float = 10.0
    backoff_max_ms: float = 2_000.0
    free_attempts: int = 1
    """Attempts in a row without progress that do not wait: the first fail-over is immediate."""

    def __post_init__(self) -> None:
        if not 0 < self.backoff_base_ms <= self.backoff_max_ms:
            raise ValueError("need 0 < backoff_base_ms <= backoff_max_ms")


@dataclass(frozen=True, slots=True)
class OwnerSeen:
    """The owner as this gateway sees it when a stream to it broke."""

    state: ReplicaState
    stale: bool
    refused: bool
    """The connection was refused or reset (not: silent)."""


@dataclass(frozen=True, slots=True)
class Take:
    """Take the session under a new epoch after ``delay_ms``."""

    delay_ms: float
    why: str


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Dispatch to the same owner again after ``delay_ms``: it may be alive."""

    delay_ms: float
    why: str


def decide(
    owner: OwnerSeen, session_id: str, fruitless: int, limits: FailoverLimits
) -> Take | AskAgain:
    """``fruitless`` counts the attempts before this one, in a row, that brought no event."""
    delay = backoff_ms(session_id, fruitless, limits)
    if owner.state is ReplicaState.DOWN:
        return Take(delay, "the owner is down")
    if owner.refused:
        return Take(delay, "the owner's host refused or reset the connection")
    if owner.stale:
        return Take(delay, "the owner does not answer and its heartbeat is stale")
    return AskAgain(max(delay, limits.backoff_base_ms), "the owner's heartbeat is fresh")


def backoff_ms(session_id: str, fruitless: int, limits: FailoverLimits) -> float:
    """Exponential, with a jitter in [0.5, 1) that depends on session and attempt only."""
    waits = fruitless - limits.free_attempts
    if waits < 0:
        return 0.0
    ceiling = min(limits.backoff_max_ms, limits.backoff_base_ms * 2.0 ** min(waits, 30))
    seed = hashlib.blake2b(f"{session_id}\0{fruitless}".encode(), digest_size=4).digest()
    return ceiling * (0.5 + 0.5 * int.from_bytes(seed, "big") / 2**32)
