"""An engine that is the real sglang: its scheduler computes, its cache holds what is in use, and a
pool of pages in this replica's host memory holds what peers may have.

sglang writes every full page of its prefix cache to that pool and reads from it what its own cache
lacks (:mod:`workers.engines.sglang.storage`). So pages are exported from the pool and imported into
it without disturbing sglang. ``resident`` means in the pool; what sglang's own tiers hold beside it
its KV events tell.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio

from workers.engines.cached_pages import CachedPages
from workers.engines.port import EngineFailed, EngineInfo, EngineLoad, OnStep
from workers.engines.sglang.config import SglangConfig
from workers.engines.sglang.fingerprint import kv_fingerprint
from workers.engines.sglang.host_pages import HostPages, NoPages
from workers.engines.sglang.keys import ContextNames, PageNames
from workers.engines.sglang.native import (
    hash_pages,
    load_hash,
    namespace_seed,
    server_arguments,
)
from workers.engines.sglang.page_desk import PageDesk, PageFormat
from workers.engines.sglang.runtime import Facts, Runtime
from workers.engines.sglang_requests.base import RequestEngine
from workers.engines.sglang_requests.events import ResidentView
from workers.engines.sglang_requests.generations import Generations, salt_of

NAMES_PER_PAGE = 4
"""Page names kept for each page of the pool."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class _Started:
    """What a running engine works with."""

    runtime: Runtime
    desk: PageDesk
    view: ResidentView
    names: PageNames


class SglangEngine(RequestEngine, CachedPages):
    """See the port :class:`workers.engines.port.Engine`. Everything but :meth:`start` and
    :meth:`aclose` needs a started engine. Noise repeats only where sglang's own does: on GPUs with
    deterministic inference; on the CPU only temperature 0 repeats."""

    _it: _Started

    def __init__(self, config: SglangConfig, folder: Path, clock: Callable[[], float]) -> None:
        """``folder`` of the model; ``clock`` gives monotonic seconds (pins expire by it)."""
        super().__init__()
        self._config = config
        self._folder = folder
        self._clock = clock
        self._host: HostPages | None = None
        self._layout = ""
        self._close = AsyncExitStack()
        """Takes back what :meth:`start` has made so far."""

    # -- life ---------------------------------------------------------------------------------

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Raises EngineFailed if sglang does not start; takes its time (half a minute here)."""
        self._on_failure = on_failure
        config = self._config
        scratch = Path(tempfile.mkdtemp(prefix="sessile-sglang-"))
        self._close.callback(shutil.rmtree, scratch, ignore_errors=True)
        self._close.callback(self._close_host)
        desk = PageDesk(scratch / "pages", self._make_host)
        self._close.callback(desk.close)
        events, replay = (f"ipc://{scratch / name}" for name in ("events", "replay"))
        try:
            arguments = await anyio.to_thread.run_sync(
                _prepare, config, self._folder, desk.path, events, replay
            )
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            raise EngineFailed(str(error)) from error
        runtime = Runtime(
            arguments,
            events=events,
            replay=replay,
            on_chunk=lambda chunk: self._generations.take(chunk),
            on_events=lambda batch: self._it.view.take(batch),
            on_end=self._fail,
        )
        self._close.push_async_callback(runtime.aclose)
        try:
            with anyio.move_on_after(config.start_timeout_s) as scope:
                facts = await runtime.start()
        except EngineFailed as error:
            if desk.refusal is None:
                raise
            raise EngineFailed(desk.refusal) from error
        if scope.cancelled_caught:
            raise EngineFailed(f"sglang did not start within {config.start_timeout_s} s")
        fingerprint = await anyio.to_thread.run_sync(self._fingerprint, facts)
        self._open(facts, fingerprint, runtime, desk)
        if self._failure is not None:
            raise self._failure  # it ended meanwhile
        self._generations.on_step = on_step

    def _open(self, facts: Facts, fingerprint: bytes, runtime: Runtime, desk: PageDesk) -> None:
        config, host = self._config, self._host
        # sglang admits a request only beside a free page; one that never is would wait for ever.
        room = facts.max_total_tokens - config.page_size - 1
        limit = min(facts.context_tokens, facts.max_input_tokens, room)
        device_pages = facts.max_total_tokens // config.page_size
        info = EngineInfo(
            engine="sglang",
            model=self._folder.name,
            vocab_size=facts.vocab_size,
            max_context_tokens=min(limit, config.max_context_tokens or limit),
            page_size=config.page_size,
            capacity_pages=device_pages,
            page_bytes=0 if host is None else host.page_bytes,
            kv_fingerprint=fingerprint,
            max_running=config.max_running,
            max_queued=config.max_queued,
            eos_token_ids=facts.eos_token_ids,
        )
        pool_pages = device_pages if host is None else host.pages
        self._keep_pages(info, host or NoPages(), self._clock, pool_pages)
        names = PageNames(NAMES_PER_PAGE * pool_pages)
        self._it = _Started(runtime, desk, ResidentView(fingerprint, config.page_size), names)
        self._close_host()  # every rank has mapped it
        self._generations = Generations(runtime, info, self._context, self._salt)
        desk.open(self._cache, names)
        runtime.listen()

    def _make_host(self, pages: PageFormat) -> HostPages:
        """On a thread of the desk's, while sglang starts. What it raises ends the start."""
        config = self._config
        count = config.host_pages or pages.device_pages
        if config.host_pages is None and config.host_memory_mb is not None:
            count = (config.host_memory_mb << 20) // pages.page_bytes
        if count < pages.device_pages:
            raise EngineFailed(
                f"host memory has {count} KV pages of {pages.page_bytes} bytes, the device "
                f"{pages.device_pages}: give more of host_memory_mb or leave it out, or lower "
                "sglang's max_total_tokens"
            )
        self._layout = pages.layout
        self._host = HostPages(SHARED_MEMORY, count, pages.page_bytes)
        return self._host

    def _close_host(self) -> None:
        if self._host is not None:
            self._host.close()

    def _fingerprint(self, facts: Facts) -> bytes:
        """Reads the weights."""
        return kv_fingerprint(
            self._folder,
            facts.arguments,
            version=version("sglang"),
            dtype=facts.dtype,
            layout=self._layout,
            page_size=self._config.page_size,
        )

    async def aclose(self) -> None:
        self._end()
        await self._close.aclose()

    # -- pages --------------------------------------------------------------------------------

    def _context(self, namespace: bytes, tokens: Sequence[int]) -> ContextNames:
        context = ContextNames(
            self._it.names,
            hash_pages,
            kv_fingerprint=self._info.kv_fingerprint,
            namespace=namespace,
            seed=namespace_seed(self._salt(namespace)),
            page_size=self._info.page_size,
        )
        context.extend(tokens)
        # sglang may have them still and never ask: they are in use all the same.
        self._cache.release(self._cache.acquire(context.block_hashes))
        return context

    def _salt(self, namespace: bytes) -> str:
        """Nor do the keys of a storage that replicas share meet those of other KV."""
        return salt_of(namespace, self._info.kv_fingerprint)

    def reusable_pages(self, block_hashes: Sequence[bytes]) -> int:
        return max(self.resident_pages(block_hashes), self.held_by_sglang(block_hashes))

    def held_by_sglang(self, block_hashes: Sequence[bytes]) -> int:
        """How many of these pages, from the first, sglang's own tiers hold, as its events tell."""
        return self._it.view.run(block_hashes)

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        self._tag(pin_id, ttl_s)
        return super().pin(pin_id, block_hashes, ttl_s)

    def unpin(self, pin_id: str) -> None:
        self._untag(pin_id)
        super().unpin(pin_id)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        """sglang itself lets go of them when it needs the room; until then they are of no use to
        anybody who does not have the same tokens and namespace. What it still has to write of them
        is not kept, unless somebody asks for it again."""
        self._it.view.forget(block_hashes)
        self._it.names.forget(block_hashes)
        return super().drop(block_hashes)

    async def flush(self) -> bool:
        """Forgets all cached KV that is not in use, here and in sglang; False if sglang has not,
        because requests run."""
        self._cache.release(self._cache.allocate(self._cache.free_pages))
        return await self._it.runtime.flush()

    def _close_session(self, session_id: str) -> None:
        self._it.runtime.close_session(session_id)

    def _pages_freed(self) -> None:
        """sglang asks again by itself."""

    # -- reports ------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        """Of the device's pages: a larger pool does not let more contexts run."""
        free = min(self._cache.free_pages, self._info.capacity_pages)
        return self._load(free, self._cache.pinned_pages)

    def check_integrity(self) -> None:
        self._check_pages(self._it.desk.holders())


def _prepare(config: SglangConfig, folder: Path, socket: Path, events: str, replay: str) -> Any:
    """On a thread: what takes seconds before sglang starts. Returns its ``ServerArgs``."""
    load_hash()
    return server_arguments(config, folder, socket, events, replay)
