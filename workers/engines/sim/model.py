"""The sim engine's "model": its next token is a hash of its whole context.

Each token has a state of 16 bytes, chained over all tokens before it: its KV. A context attends to
the states of all its tokens, in order, by hashing them; what it says next is a function of that
hash. So a token that is lost, repeated, reordered or foreign changes everything after it, and so
does a single wrong byte in a cached page. Pure functions: a checker can recompute any output from
the ledger alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from workers.engines.port import Sampling
from workers.text.byte_vocabulary import END_OF_TURN, PRINTABLE

STATE_BYTES = 16
"""KV bytes of one token."""

MAX_REDRAWS = 64
"""Draws before a token that may be said is taken without one."""


class Context:
    """What has been computed of one context. Mutable."""

    __slots__ = ("_attention", "_state", "length")

    def __init__(self) -> None:
        self.length = 0
        self._state = bytes(STATE_BYTES)
        self._attention = hashlib.blake2b(digest_size=STATE_BYTES, person=b"sim-attention")

    def compute(self, token: int) -> bytes:
        """The state of the next token."""
        packed = token.to_bytes(4, "little")
        self._state = hashlib.blake2b(
            self._state + packed, digest_size=STATE_BYTES, person=b"sim-token"
        ).digest()
        self._attention.update(self._state)
        self.length += 1
        return self._state

    def read(self, states: bytes | memoryview) -> None:
        """Takes the states of the next tokens from a cache, whatever they are."""
        self._attention.update(states)
        self._state = bytes(states[-STATE_BYTES:])
        self.length += len(states) // STATE_BYTES

    def attention(self) -> bytes:
        return self._attention.digest()


def next_token(
    attention: bytes,
    position: int,
    sampling: Sampling,
    eos_probability: float,
    banned: Collection[int] = (),
) -> int:
    """The token at ``position``. With temperature 0 a function of the context alone; otherwise
    mixed with (seed, position). ``top_p`` and ``top_k`` have nothing to choose from here."""
    if sampling.temperature > 0:
        noise = (sampling.seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
        attention = hashlib.blake2b(
            attention + noise, digest_size=STATE_BYTES, person=b"sim-noise"
        ).digest()
    for draw in range(MAX_REDRAWS):
        number = int.from_bytes(
            hashlib.blake2b(attention, digest_size=8, salt=draw.to_bytes(2, "little")).digest(),
            "little",
        )
        if (number >> 32) < eos_probability * (1 << 32):
            token = END_OF_TURN
        else:
            token = PRINTABLE[number % len(PRINTABLE)]
        if token not in banned:
            return token
    return next(token for token in range(END_OF_TURN + 1) if token not in banned)


def expected_output(
    context: Sequence[int],
    count: int,
    sampling: Sampling,
    eos_probability: float,
    *,
    min_new_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """What a correct engine says after ``context``: ``count`` tokens, fewer if a stop token is
    among them. The reference for checkers; shares nothing with the engine but this module."""
    state = Context()
    for token in context:
        state.compute(token)
    output: list[int] = []
    while len(output) < count:
        banned = stop_token_ids if len(output) < min_new_tokens else ()
        token = next_token(state.attention(), state.length, sampling, eos_probability, banned)
        output.append(token)
        if token in stop_token_ids:
            break
        state.compute(token)
    return output
