"""Chained block hashes: the name of a KV page is a hash of everything that went into it.

``h[i] = BLAKE2b-128(h[i-1] || tokens of page i)``, seeded with the KV fingerprint and a namespace
(the tenant's salt, or a public one). Equal names therefore mean equal model, layout, tenant and
whole prefix; no tenant can name, and so match or time, another's pages. After the prefix-chained
block ids of vLLM's automatic prefix caching.

An operator may declare prefixes public. Pages that lie wholly within one are named without a salt,
the same for all tenants; the first page beyond is chained to the last public one and the salt.
Whether a page is public depends on nothing but the tokens up to its end, so its name never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from statestore.digest import pack_tokens

BLOCK_HASH_BYTES = 16
PUBLIC_NAMESPACE = b""
"""Of public pages. No tenant's salt is empty."""
MAX_PUBLIC_PAGES = 1 << 16
"""Of all prefixes that are declared public together."""


@dataclass(slots=True)
class PublicPages:
    """Names of the pages that all tenants may share; empty unless an operator declared some. They
    are declared before the engine starts and stay."""

    names: set[bytes] = field(default_factory=set)

    def declare(self, kv_fingerprint: bytes, tokens: Sequence[int], page_size: int) -> int:
        """Makes the whole pages of these leading tokens public; returns their number. Raises
        ValueError over MAX_PUBLIC_PAGES."""
        found = block_hashes(kv_fingerprint, PUBLIC_NAMESPACE, tokens, page_size)
        if len(self.names | set(found)) > MAX_PUBLIC_PAGES:
            raise ValueError(f"public prefixes have at most {MAX_PUBLIC_PAGES} pages together")
        self.names.update(found)
        return len(found)


NOTHING_PUBLIC = PublicPages()


def page_name(
    kv_fingerprint: bytes,
    namespace: bytes,
    public: PublicPages,
    previous: bytes | None,
    packed_page: bytes,
) -> bytes:
    """Name of a page (its tokens packed) behind the one named ``previous``; None: it is the
    first."""
    if public.names and (previous is None or previous in public.names):
        root = root_hash(kv_fingerprint, PUBLIC_NAMESPACE)
        shared = next_hash(previous or root, packed_page)
        if shared in public.names:
            return shared
    if previous is None:
        previous = root_hash(kv_fingerprint, namespace)
    elif previous in public.names:
        previous = root_hash(previous, namespace)
    return next_hash(previous, packed_page)


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
    kv_fingerprint: bytes,
    namespace: bytes,
    tokens: Sequence[int],
    page_size: int,
    public: PublicPages = NOTHING_PUBLIC,
) -> list[bytes]:
    """Hashes of the whole pages of ``tokens``, in order; a partial last page has none."""
    data = pack_tokens(tokens[: len(tokens) - len(tokens) % page_size])
    previous: bytes | None = None
    step = page_size * 4
    hashes: list[bytes] = []
    for start in range(0, len(data), step):
        page = data[start : start + step]
        previous = page_name(kv_fingerprint, namespace, public, previous, page)
        hashes.append(previous)
    return hashes
