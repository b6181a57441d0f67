"""Rolling digest of a ledger: the same tokens give the same digest however they were appended.

The digest of the first ``n`` tokens is ``H(chain, tail)``, where ``chain`` is a hash chained over
whole blocks of ``BLOCK_TOKENS`` tokens and ``tail`` are the tokens after the last whole block. So
an append costs one short hash, and a digest at any earlier position can be recomputed from the
tokens. ``H`` is BLAKE2b-128 keyed by the tenant's salt: opaque, unrelated between tenants.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence

from statestore.records import Position

BLOCK_TOKENS = 64
DIGEST_BYTES = 16


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as packed little-endian uint32 (raises OverflowError outside uint32)."""
    packed = array("I", tokens)
    if packed.itemsize != 4:  # pragma: no cover - no such platform is supported
        raise RuntimeError("this platform has no 4-byte unsigned int")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of :func:`pack_tokens`; raises ValueError if ``data`` is not whole tokens."""
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are not a whole number of uint32 tokens")
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class RollingDigest:
    """Digest state at a position of one ledger. Mutable; :meth:`copy` for a snapshot."""

    __slots__ = ("_chain", "_length", "_salt", "_tail")

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._chain = b""
        self._tail = b""
        self._length = 0

    @classmethod
    def of(cls, salt: bytes, tokens: Sequence[int]) -> RollingDigest:
        state = cls(salt)
        state.update(tokens)
        return state

    def copy(self) -> RollingDigest:
        other = RollingDigest(self._salt)
        other._chain, other._tail, other._length = self._chain, self._tail, self._length
        return other

    def update(self, tokens: Sequence[int]) -> None:
        data = self._tail + pack_tokens(tokens)
        step = BLOCK_TOKENS * 4
        whole = len(data) - len(data) % step
        for start in range(0, whole, step):
            self._chain = self._hash(b"b", data[start : start + step])
        self._tail = data[whole:]
        self._length += len(tokens)

    def position(self) -> Position:
        return Position(self._length, self._hash(b"t", self._tail))

    def _hash(self, kind: bytes, data: bytes) -> bytes:
        return hashlib.blake2b(
            self._chain + data, digest_size=DIGEST_BYTES, key=self._salt, person=kind
        ).digest()
