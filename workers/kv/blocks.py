"""Chained block hashes: the name of a KV page is a hash of everything that went into it.

``h[i] = BLAKE2b-128(h[i-1] || tokens of page i)``, seeded with the KV fingerprint and a namespace
(the tenant's salt, or a public one). Equal names therefore mean equal model, layout, tenant and
whole prefix; no tenant can name, and so match or time, another's pages. After the prefix-chained
block ids of vLLM's automatic prefix caching.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from statestore.digest import pack_tokens

BLOCK_HASH_BYTES = 16


def root_hash(kv_fingerprint: bytes, namespace: bytes) -> bytes:
    """What the first page's hash is chained to."""
    return hashlib.blake2b(
        kv_fingerprint + namespace, digest_size=BLOCK_HASH_BYTES, person=b"kv-root"
    ).digest()


def next_hash(previous: bytes, packed_page: bytes) -> bytes:
    """Hash of a page (its tokens packed) that follows the block ``previous``, or the root."""
    return hashlib.blake2b(
        previous + packed_page, digest_size=BLOCK_HASH_BYTES, person=b"kv-block"
    ).digest()


def block_hashes(
    kv_fingerprint: bytes, namespace: bytes, tokens: Sequence[int], page_size: int
) -> list[bytes]:
    """Hashes of the whole pages of ``tokens``, in order; a partial last page has none."""
    data = pack_tokens(tokens[: len(tokens) - len(tokens) % page_size])
    previous = root_hash(kv_fingerprint, namespace)
    step = page_size * 4
    hashes: list[bytes] = []
    for start in range(0, len(data), step):
        previous = next_hash(previous, data[start : start + step])
        hashes.append(previous)
    return hashes
