"""What a ledger must say, in the checkers' own words: inputs, outputs, text and digests.

Written once more from the documented formats, so that a fault of the codec, of the output fold, of
the plan of a turn or of the rolling digest is not found right by itself. Shared with the product
are the numbers of the byte vocabulary, and the model, which defines what a right answer is. Only
what simulated clients ask for is known here: plain messages, no tools.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from workers.engines.port import Sampling
from workers.engines.sim.config import SimConfig
from workers.engines.sim.model import expected_output
from workers.text.byte_vocabulary import ASSISTANT, BOS, END_OF_TURN, SYSTEM, USER

MARKERS = {pb.Message.ROLE_SYSTEM: SYSTEM, pb.Message.ROLE_USER: USER}
BLOCK_BYTES = 4 * 64
"""Of the ledger, as the digest chains them."""
DIGEST_BYTES = 16


def rendered(preamble: bytes, messages: Sequence[pb.Message], before: Sequence[int]) -> list[int]:
    """A turn's input after the ledger ``before`` it. The first turn begins with the session's
    leading messages; an output that did not end by itself is closed."""
    tokens: list[int] = []
    said = list(messages)
    if not before:
        tokens.append(BOS)
        said = [*session_pb2.OpenSessionRequest.FromString(preamble).messages, *said]
    elif before[-1] != END_OF_TURN:
        tokens.append(END_OF_TURN)
    for message in said:
        tokens += [MARKERS[message.role], *message.content.encode(), END_OF_TURN]
    return [*tokens, ASSISTANT]


@dataclass(frozen=True, slots=True)
class Said:
    """An output and how it ends."""

    tokens: list[int]
    stopped: bool
    """By an end of turn, a stop token or a stop string; else by its length."""


def answer(context: Sequence[int], params: pb.SamplingParams, engine: SimConfig) -> Said:
    """The whole output after a context, with a turn's resolved parameters."""
    ends = frozenset(params.stop_token_ids) | (set() if params.ignore_eos else {END_OF_TURN})
    tokens = expected_output(
        context,
        min(params.max_tokens, max(1, engine.max_context_tokens - len(context))),
        Sampling(
            temperature=params.temperature,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            top_k=params.top_k,
            seed=params.seed,
        ),
        engine.eos_probability,
        min_new_tokens=params.min_tokens,
        stop_token_ids=ends,
    )
    cut = stop_string_at(tokens, params)
    if cut is not None:
        return Said(tokens[: cut[0]], stopped=True)
    return Said(tokens, stopped=tokens[-1] in ends)


def stop_string_at(tokens: Sequence[int], params: pb.SamplingParams) -> tuple[int, str] | None:
    """After how many tokens the first stop string is complete, and which; the longest of several.
    A token adds one character at most."""
    for count in range(max(1, params.min_tokens), len(tokens) + 1):
        if tokens[count - 1] < BOS:
            said = _decoded(tokens[:count])
            complete = [stop for stop in params.stop if said.endswith(stop)]
            if complete:
                return count, max(complete, key=len)
    return None


def text_of(tokens: Sequence[int], params: pb.SamplingParams) -> str:
    """The text of an output that has ended, up to its stop string."""
    cut = stop_string_at(tokens, params)
    if cut is None:
        return _decoded(tokens)
    return _decoded(tokens[: cut[0]]).removesuffix(cut[1])


def _decoded(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < BOS).decode("utf-8", "replace")


class Digests:
    """The digests of one ledger at all of its positions: ``H(chain, tail)``, where ``chain`` hashes
    whole blocks, one after the other, and ``tail`` are the tokens after the last of them."""

    def __init__(self, salt: bytes, ledger: Sequence[int]) -> None:
        self._salt = salt
        self._data = b"".join(token.to_bytes(4, "little") for token in ledger)
        self._chains = [b""]
        for end in range(BLOCK_BYTES, len(self._data) + 1, BLOCK_BYTES):
            block = self._data[end - BLOCK_BYTES : end]
            self._chains.append(self._hash(self._chains[-1] + block, b"b"))

    def at(self, length: int) -> bytes | None:
        """The digest of the first ``length`` tokens; None if there are fewer."""
        end = 4 * length
        if end > len(self._data):
            return None
        blocks = end // BLOCK_BYTES
        return self._hash(self._chains[blocks] + self._data[blocks * BLOCK_BYTES : end], b"t")

    def _hash(self, data: bytes, kind: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=self._salt, person=kind).digest()
