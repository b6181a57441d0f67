"""The engine behind a replica: token ids in, token ids out, and a KV cache in pages.

An engine knows nothing of sessions, turns, text or the store. It runs *generations* (one context
that grows by sampled tokens), batches them as it likes, and keeps the KV of past contexts in a
prefix cache of fixed-size pages that can be pinned, exported to and imported from peers.

Threading: every method (:meth:`PageExport.view` apart) is called on the event loop's thread and
returns quickly; an engine that computes does so in a thread of its own and delivers each step's
outputs on the event loop through the ``on_step`` callback, in order, once per step for all
generations that gained tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.kv.blocks import PublicPages


class EngineError(Exception):
    """Base of the engine's failures."""


class EngineOverloaded(EngineError):
    """A bound (queued generations) is reached; ``retry_after_ms`` is the engine's estimate."""

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class PagesExhausted(EngineError):
    """Not enough KV pages can be freed for a reservation."""


class EngineFailed(EngineError):
    """The engine's step raised, or it could not start; every generation is lost and the replica
    must stop."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine lives."""

    engine: str
    model: str
    vocab_size: int
    max_context_tokens: int
    page_size: int
    """Tokens in a page."""
    capacity_pages: int
    page_bytes: int
    """Bytes of one page as exported; 0: its pages are not for peers."""
    kv_fingerprint: bytes
    """16 bytes over everything that makes pages exchangeable: weights, dtype, page size, layout."""
    max_running: int
    max_queued: int
    eos_token_ids: tuple[int, ...]
    public: PublicPages = field(default_factory=PublicPages, compare=False)
    """Pages that all tenants share. Only for engines that name their pages by it."""


INTERACTIVE, BATCH, PREFETCH = 0, -1, -2
"""Priorities of generations: of turns that somebody waits for, of turns that nobody waits for, and
of what gets ready for turns to come."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Noise is a pure function of (seed, ledger position), so a generation
    continued elsewhere draws what it would have drawn here."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class EngineFinish(enum.StrEnum):
    """Why the engine stopped by itself."""

    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation.

    ``tokens`` is the whole context (the ledger so far, at least one token). The engine reuses the
    longest resident prefix of it within ``namespace`` (pages of other namespaces are invisible),
    always computing at least the last token. ``stop_token_ids`` end the generation (the stop token
    is delivered) once ``min_new_tokens`` tokens exist; before that they cannot be sampled.
    """

    generation_id: str
    tokens: Sequence[int]
    namespace: bytes
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = INTERACTIVE
    """Higher first in the queue. What runs is not stopped for it; an engine that is short of pages
    and schedules by itself puts the lowest back in the queue."""
    retention_id: str = ""
    """The pin that will be asked for what this computes (see :meth:`Engine.pin`); empty: none."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace headers of the turn, for an engine that traces by itself."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one generation."""

    generation_id: str
    tokens: tuple[int, ...]
    finish: EngineFinish | None = None
    cached_tokens: int | None = None
    """Set with the first output: prefix tokens taken from the cache."""
    error: str | None = None
    """This generation alone failed (for instance it can never fit); nothing follows."""
    queue_s: float | None = None
    """With the first output: time from submission until its first step began, if the engine
    knows."""


OnStep = Callable[[Sequence[StepOutput]], None]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load now, and rates measured so far (tokens/s; 0.0 until measured)."""

    running: int
    queued: int
    queued_prefill_tokens: int
    free_pages: int
    """Pages that hold nothing or only evictable cache."""
    pinned_pages: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class PageMeta:
    """A sealed page: its chained block hash and the xxh3-64 taken when it was sealed."""

    block_hash: bytes
    checksum: int


class PageExport(Protocol):
    """Sealed pages held (by reference) for a peer. Pages cannot be evicted until release."""

    @property
    def pages(self) -> Sequence[PageMeta]: ...

    def view(self, index: int) -> memoryview:
        """The page's ``page_bytes`` bytes, read-only; valid until :meth:`release`. A page that is
        not contiguous in memory may be gathered into a buffer here; any thread may call this."""
        ...

    def release(self) -> None:
        """Idempotent."""
        ...


class PageImport(Protocol):
    """Free pages reserved for incoming KV. Nothing is visible to generations before
    :meth:`commit`."""

    def buffer(self, index: int) -> memoryview:
        """``page_bytes`` writable bytes for the page ``index``, 0 <= index < pages reserved."""
        ...

    async def commit(self, pages: Sequence[PageMeta]) -> int:
        """Verifies the checksums of the first ``len(pages)`` buffers, scatters them, and enters
        them in the prefix cache as the blocks given at reservation. Stops at the first page whose
        checksum or block hash is wrong; returns how many were taken. Releases everything else. If
        it is cancelled, :meth:`release` is still to be called."""
        ...

    def release(self) -> None:
        """Idempotent; also after commit."""
        ...


class Engine(Protocol):
    """See the module's docstring for the threading rules."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Loads and warms up; returns when ready to generate."""
        ...

    async def aclose(self) -> None:
        """Ends every generation without output and frees everything. Idempotent."""
        ...

    def submit(self, request: GenerateRequest) -> None:
        """Queues a generation; raises EngineOverloaded, or ValueError for a bad request (empty or
        over-long context, duplicate id, token outside the vocabulary)."""
        ...

    def park(self, generation_id: str) -> None:
        """No further steps for this generation until :meth:`unpark`. Outputs of a step already
        under way may still arrive. Unknown ids are ignored."""
        ...

    def unpark(self, generation_id: str) -> None: ...

    def cancel(self, generation_id: str) -> None:
        """Ends a generation; after return nothing more is delivered for it. What it computed stays
        in the prefix cache, but for a step under way. Unknown ids are ignored."""
        ...

    def block_hashes(self, namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Chained hashes of the whole pages of ``tokens`` (see workers/kv/blocks.py)."""
        ...

    def resident_pages(self, block_hashes: Sequence[bytes]) -> int:
        """Longest run of these blocks, from the first, that is sealed and resident, so that it can
        be exported, pinned and added to; in pages."""
        ...

    def reusable_pages(self, block_hashes: Sequence[bytes]) -> int:
        """The same, wherever the engine keeps them: what a generation would find. At least
        :meth:`resident_pages`."""
        ...

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        """Soft pin: the resident run of these blocks is evicted only after unpinned pages, until
        ``ttl_s`` passed or :meth:`unpin`. Replaces an earlier pin of that id; returns its pages.
        Pins yield to running generations and to reservations."""
        ...

    def unpin(self, pin_id: str) -> None: ...

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        """Frees those of the blocks that nothing else uses (running generation, export, another
        pin, a longer context's pages in between); returns how many. What is in use but not pinned
        is freed when it is let go of, unless somebody asks for it before."""
        ...

    def export_pages(self, block_hashes: Sequence[bytes]) -> PageExport:
        """Holds the longest resident run, possibly empty."""
        ...

    def reserve_import(
        self, block_hashes: Sequence[bytes], first_page: int, pages: int
    ) -> PageImport:
        """Reserves ``pages`` pages for blocks ``first_page …`` of a context with these block hashes
        (those before must be resident, else ValueError), evicting cache (soft pins last) if needed.
        Raises PagesExhausted, and reserves all or nothing."""
        ...

    def load(self) -> EngineLoad: ...

    def check_integrity(self) -> None:
        """Raises AssertionError if page accounting does not add up: every page is exactly one of
        free, cached, in use or reserved; reference counts match their holders."""
        ...
