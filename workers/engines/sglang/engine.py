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
from pathlib import Path

import anyio

from workers.engines.cached_pages import CachedPages
from workers.engines.port import EngineFailed, EngineInfo, EngineLoad, OnStep
from workers.engines.sglang.arguments import hash_pages, namespace_seed, server_arguments
from workers.engines.sglang.base import RequestEngine
from workers.engines.sglang.config import SglangConfig
from workers.engines.sglang.events import ResidentView
from workers.engines.sglang.fingerprint import kv_fingerprint
from workers.engines.sglang.host_pages import HostPages, NoPages
from workers.engines.sglang.keys import ContextNames, PageNames
from workers.engines.sglang.page_desk import PageDesk
from workers.engines.sglang.requests import Generations, salt_of
from workers.engines.sglang.runtime import Facts, Runtime

NAMES_PER_PAGE = 4
"""Page names kept for each page of the pool."""
SHARED_MEMORY = Path("/dev/shm")


class SglangEngine(RequestEngine, CachedPages):
    """See the port :class:`workers.engines.port.Engine`. Everything but :meth:`start` and
    :meth:`aclose` needs a started engine. Noise repeats only where sglang's own does: on GPUs with
    deterministic inference; on the CPU only temperature 0 repeats."""

    _view: ResidentView
    _names: PageNames

    def __init__(self, config: SglangConfig, folder: Path, clock: Callable[[], float]) -> None:
        """``folder`` of the model; ``clock`` gives monotonic seconds (pins expire by it)."""
        super().__init__()
        self._config = config
        self._folder = folder
        self._clock = clock
        self._runtime: Runtime | None = None
        self._desk: PageDesk | None = None
        self._host: HostPages | None = None
        self._layout = ""
        self._scratch: Path | None = None

    # -- life ---------------------------------------------------------------------------------

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Raises EngineFailed if sglang does not start; takes its time (half a minute here)."""
        self._on_failure = on_failure
        config = self._config
        self._scratch = Path(tempfile.mkdtemp(prefix="sessile-sglang-"))
        self._desk = PageDesk(self._scratch / "pages", self._make_host)
        events, replay = (f"ipc://{self._scratch / name}" for name in ("events", "replay"))
        try:
            arguments = await anyio.to_thread.run_sync(
                server_arguments, config, self._folder, self._desk.path, events, replay
            )
        except ValueError as error:
            raise EngineFailed(str(error)) from error
        self._runtime = Runtime(
            arguments,
            events=events,
            replay=replay,
            on_chunk=lambda chunk: self._generations.take(chunk),
            on_events=lambda batch: self._view.take(batch),
            on_end=self._fail,
        )
        with anyio.move_on_after(config.start_timeout_s) as scope:
            facts = await self._runtime.start()
        if scope.cancelled_caught:
            raise EngineFailed(f"sglang did not start within {config.start_timeout_s} s")
        fingerprint = await anyio.to_thread.run_sync(
            kv_fingerprint, self._folder, facts, self._layout, config.page_size
        )
        self._open(facts, fingerprint)
        if self._failure is not None:
            raise self._failure  # it ended meanwhile
        self._generations.on_step = on_step

    def _open(self, facts: Facts, fingerprint: bytes) -> None:
        config, host = self._config, self._host
        # sglang admits a request only beside a free page; one that never is would wait for ever.
        room = facts.max_total_tokens - config.page_size - 1
        limit = min(facts.context_tokens, facts.max_input_tokens, room)
        device_pages = facts.max_total_tokens // config.page_size
        if host is not None and host.pages < device_pages:
            raise EngineFailed(
                f"host memory has {host.pages} KV pages, the device {device_pages}: give more of "
                "host_memory_mb, or lower sglang's max_total_tokens"
            )
        info = EngineInfo(
            engine="sglang",
            model=self._folder.name,
            vocab_size=facts.vocab_size,
            max_context_tokens=min(limit, config.max_context_tokens or limit),
            page_size=config.page_size,
            capacity_pages=device_pages if host is None else host.pages,
            page_bytes=0 if host is None else host.page_bytes,
            kv_fingerprint=fingerprint,
            max_running=config.max_running,
            max_queued=config.max_queued,
            eos_token_ids=facts.eos_token_ids,
        )
        assert self._runtime is not None
        assert self._desk is not None
        self._keep_pages(info, host or NoPages(), self._clock)
        self._names = PageNames(NAMES_PER_PAGE * info.capacity_pages)
        self._view = ResidentView(fingerprint, config.page_size)
        if host is not None:
            host.unlink()  # every rank has mapped it: nothing stays if this process is killed
        self._generations = Generations(self._runtime, info, self._context)
        self._desk.open(self._cache, self._names)
        self._runtime.listen()

    def _make_host(self, page_bytes: int, layout: str) -> HostPages:
        """On a thread of the desk's, while sglang starts."""
        config = self._config
        pages = config.host_pages or (config.host_memory_mb << 20) // page_bytes
        assert self._scratch is not None
        self._layout = layout
        self._host = HostPages(SHARED_MEMORY / self._scratch.name, pages, page_bytes)
        return self._host

    async def aclose(self) -> None:
        scratch, self._scratch = self._scratch, None
        if scratch is None:
            return
        self._end()
        if self._runtime is not None:
            await self._runtime.aclose()
        if self._desk is not None:
            self._desk.close()
        if self._host is not None:
            self._host.unlink()
        shutil.rmtree(scratch, ignore_errors=True)

    # -- pages --------------------------------------------------------------------------------

    def _context(self, namespace: bytes, tokens: Sequence[int]) -> ContextNames:
        context = ContextNames(
            self._names,
            hash_pages,
            kv_fingerprint=self._info.kv_fingerprint,
            namespace=namespace,
            seed=namespace_seed(salt_of(namespace)),
            page_size=self._info.page_size,
        )
        context.extend(tokens)
        # sglang may have them still and never ask: they are in use all the same.
        self._cache.release(self._cache.acquire(context.block_hashes))
        return context

    def reusable_pages(self, block_hashes: Sequence[bytes]) -> int:
        return max(self.resident_pages(block_hashes), self._view.run(block_hashes))

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
        self._view.forget(block_hashes)
        self._names.forget(block_hashes)
        return super().drop(block_hashes)

    async def flush(self) -> bool:
        """Forgets all cached KV that is not in use, here and in sglang; False if sglang has not,
        because requests run."""
        self._cache.release(self._cache.allocate(self._cache.free_pages))
        assert self._runtime is not None
        return await self._runtime.flush()

    def _close_session(self, session_id: str) -> None:
        assert self._runtime is not None
        self._runtime.close_session(session_id)

    def _pages_freed(self) -> None:
        """sglang asks again by itself."""

    # -- reports ------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        return self._load(self._cache.free_pages, self._cache.pinned_pages)

    def check_integrity(self) -> None:
        assert self._desk is not None
        self._check_pages(self._desk.holders())
