"""What a session's ledger is, computed from the bytes in the store alone: its tokens with those it
inherits, and the digest that its head must have (P1).

The digest is written down here once more, from its description and not from the code under test:
``H(chain, tail)`` with ``H`` BLAKE2b-128 keyed by the tenant's salt, where ``chain`` is hashed over
whole blocks of 64 tokens and ``tail`` are the tokens after the last of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

Stored = bytes | dict[bytes, bytes] | object | None

TOKEN_BYTES = 4
BLOCK_BYTES = 64 * TOKEN_BYTES


def digest_of(salt: bytes, tokens: bytes) -> bytes:
    """The rolling digest of packed tokens."""
    chain, whole = b"", len(tokens) - len(tokens) % BLOCK_BYTES
    for at in range(0, whole, BLOCK_BYTES):
        chain = _hash(salt, b"b", chain + tokens[at : at + BLOCK_BYTES])
    return _hash(salt, b"t", chain + tokens[whole:])


def _hash(salt: bytes, kind: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=salt, person=kind).digest()


class Ledgers:
    """``peek`` reads a key of the store."""

    def __init__(self, peek: Callable[[str], Stored]) -> None:
        self._peek = peek

    def tokens(self, session_id: str, record: Mapping[bytes, bytes]) -> bytes:
        """All packed tokens of a session, those of its ancestors first."""
        family = session_id.removeprefix("ses_").partition(".")[0]
        tokens = b""
        for segment in filter(None, record.get(b"segments", b"").split(b",")):
            ancestor, start, end, *_ = segment.split(b":")
            first, last = int(start), int(end)
            theirs = self._string(f"sessile:{{{family}}}:l:{ancestor.decode()}")
            tokens += theirs[: TOKEN_BYTES * (last - first)]
        return tokens + self._string(f"sessile:{{{family}}}:l:{session_id}")

    def judge(self, session_id: str, record: Mapping[bytes, bytes]) -> list[str]:
        """What is wrong with the head of a session's record."""
        salt = self._string(f"sessile:tenant-salt:{record[b'tenant'].decode()}")
        tokens, length = self.tokens(session_id, record), int(record[b"length"])
        if len(tokens) != TOKEN_BYTES * length:
            return [f"P1: the head is at {length}, the ledger has {len(tokens) / TOKEN_BYTES:g}"]
        if digest_of(salt, tokens) != record[b"digest"]:
            return [f"P1: the digest at {length} is of other tokens than the ledger's"]
        return []

    def _string(self, key: str) -> bytes:
        value = self._peek(key)
        return value if isinstance(value, bytes) else b""
