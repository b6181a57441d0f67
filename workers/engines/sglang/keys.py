"""What sglang calls a page, and what Sessile calls the same page.

sglang's storage names a page by a chain of SHA-256 over token ids, seeded with the request's
``cache_salt``; Sessile by the chain of ``workers/kv/blocks.py``. Both are functions of the same
tokens, and every token that sglang computes went through this replica: so both are computed here,
and the one is looked up by the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from statestore.digest import pack_tokens
from workers.kv.blocks import next_hash, root_hash

HashPages = Callable[[list[int], str | None, int], list[str]]
"""sglang's ``get_hash_str(token_ids, prior_hash, page_size)``: one hex name for each page."""


@dataclass(frozen=True, slots=True)
class PageName:
    """A page as Sessile names it, and the page before it (None for a context's first)."""

    block_hash: bytes
    parent: bytes | None


class PageNames:
    """sglang's key -> name, for the pages computed or asked for of late; bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: OrderedDict[str, PageName] = OrderedDict()
        self._keys: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def note(self, key: str, name: PageName) -> None:
        self._names[key] = name
        self._keys[name.block_hash] = key
        self._names.move_to_end(key)
        if len(self._names) > self._limit:
            _, old = self._names.popitem(last=False)
            del self._keys[old.block_hash]

    def forget(self, block_hashes: Sequence[bytes]) -> None:
        """Until a request has these pages again, nobody is to keep them."""
        for block_hash in block_hashes:
            key = self._keys.pop(block_hash, None)
            if key is not None:
                del self._names[key]

    def get(self, key: str) -> PageName | None:
        return self._names.get(key)


class ContextNames:
    """Names the pages of one context as it grows."""

    def __init__(
        self,
        names: PageNames,
        hash_pages: HashPages,
        *,
        kv_fingerprint: bytes,
        namespace: bytes,
        seed: str | None,
        page_size: int,
    ) -> None:
        """``seed`` is what sglang's chain begins with in this namespace."""
        self._names = names
        self._hash_pages = hash_pages
        self._page_size = page_size
        self._tail: list[int] = []
        self._key = seed
        self._root = root_hash(kv_fingerprint, namespace)
        self.block_hashes: list[bytes] = []
        """Our names of the whole pages so far."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The context goes on with these tokens."""
        self._tail.extend(tokens)
        size = self._page_size
        whole = len(self._tail) // size * size
        if not whole:
            return
        pages, self._tail = self._tail[:whole], self._tail[whole:]
        packed = pack_tokens(pages)
        for index, key in enumerate(self._hash_pages(pages, self._key, size)):
            page = packed[4 * size * index : 4 * size * (index + 1)]
            parent = self.block_hashes[-1] if self.block_hashes else None
            block_hash = next_hash(parent or self._root, page)
            self._names.note(key, PageName(block_hash, parent))
            self.block_hashes.append(block_hash)
            self._key = key
