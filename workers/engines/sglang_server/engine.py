"""An engine that is an sglang server which somebody else runs: everything but its KV.

Its pages cannot be had over HTTP. So nothing is exported or imported, and its KV fingerprint is
that of nobody else: sessions move to and from it by recomputation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import httpx2

from workers.engines.port import (
    EngineFailed,
    EngineInfo,
    EngineLoad,
    OnStep,
    PageExport,
    PageImport,
    PageMeta,
    PagesExhausted,
)
from workers.engines.sglang.base import RequestEngine
from workers.engines.sglang.events import ResidentView, follow_events
from workers.engines.sglang.requests import Chunk, Generations, Request, chunk_of
from workers.engines.sglang_server.client import ServerFacts, SglangClient
from workers.engines.sglang_server.config import SglangServerConfig
from workers.kv.blocks import block_hashes

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 2.0
UNHEALTHY = 3
"""Times in a row that a server does not answer before it is taken for dead."""


class SglangServerEngine(RequestEngine):
    """See the port :class:`workers.engines.port.Engine`."""

    def __init__(self, config: SglangServerConfig, folder: Path) -> None:
        """``folder`` of the server's model."""
        super().__init__()
        self._config = config
        self._folder = folder
        self._task: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self, on_step: OnStep, on_failure: Callable[[EngineFailed], None]) -> None:
        """Raises EngineFailed if the server cannot be asked."""
        config = self._config
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._client = SglangClient(
            config.url, config.api_key, config.timeout_s, 2 * config.max_running + 8
        )
        try:
            self._facts = await self._client.facts()
        except EngineFailed:
            await self._client.aclose()
            raise
        self._info = _info(config, self._folder, self._facts)
        self._view = ResidentView(self._info.kv_fingerprint, self._info.page_size)
        self._generations = Generations(self, self._info, lambda namespace, tokens: _Unnamed())
        self._generations.on_step = on_step
        ready = anyio.Event()
        # The one task without a task group above it: the port has none to give. It is awaited in
        # aclose, and owns all others.
        self._task = asyncio.create_task(self._run(ready), name="sglang-server")
        await ready.wait()

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        self._end()
        task.cancel()
        with anyio.CancelScope(shield=True):
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._client.aclose()

    async def _run(self, ready: anyio.Event) -> None:
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._watch, name="health")
            if self._config.events:
                self._tasks.start_soon(self._listen, name="events")
            ready.set()
            await anyio.sleep_forever()

    async def _watch(self) -> None:
        missed = 0
        while True:
            await anyio.sleep(HEALTH_PERIOD_S)
            missed = 0 if await self._client.healthy() else missed + 1
            if missed >= UNHEALTHY:
                self._fail(
                    EngineFailed(
                        f"the sglang server {self._config.url} does not answer; restart the "
                        "replica when it does"
                    )
                )

    async def _listen(self) -> None:
        async for batch in follow_events(self._config.events, self._config.replay):
            self._view.take(batch)

    # -- generations --------------------------------------------------------------------------

    def generate(self, request: Request) -> None:
        """As a :class:`workers.engines.sglang.requests.Sender`."""
        self._tasks.start_soon(self._stream, request, name=request.rid)

    def abort(self, rid: str) -> None:
        self._tasks.start_soon(self._try, self._client.abort, rid, name="abort")

    async def _stream(self, request: Request) -> None:
        since = self._loop.time()
        try:
            async with contextlib.aclosing(self._client.stream(request, self._facts)) as answers:
                async for answer in answers:
                    before, since = since, self._loop.time()
                    self._generations.take(chunk_of(request.rid, answer, since - before))
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            detail = f"the sglang server: {type(error).__name__}: {error}"
            self._generations.take(Chunk(request.rid, (), 0, 0.0, None, detail))

    async def _try(self, call: Callable[[str], Awaitable[None]], name: str) -> None:
        """What need not succeed: the server ends it by itself in time."""
        try:
            await call(name)
        except httpx2.HTTPError as error:
            log.warning("the sglang server does not let go of %s: %s", name, error)

    # -- pages --------------------------------------------------------------------------------

    def block_hashes(self, namespace: bytes, tokens: Sequence[int]) -> list[bytes]:
        return block_hashes(self._info.kv_fingerprint, namespace, tokens, self._info.page_size)

    def resident_pages(self, block_hashes: Sequence[bytes]) -> int:
        """None can be had."""
        return 0

    def reusable_pages(self, block_hashes: Sequence[bytes]) -> int:
        """As far as the server's KV events tell."""
        return self._view.run(block_hashes)

    def pin(self, pin_id: str, block_hashes: Sequence[bytes], ttl_s: float) -> int:
        if self._facts.tags_sessions:
            self._tag(pin_id, ttl_s)
        return 0

    def unpin(self, pin_id: str) -> None:
        self._untag(pin_id)

    def drop(self, block_hashes: Sequence[bytes]) -> int:
        """The server lets go of them when it needs the room."""
        self._view.forget(block_hashes)
        return 0

    def export_pages(self, block_hashes: Sequence[bytes]) -> PageExport:
        return _NoExport()

    def reserve_import(
        self, block_hashes: Sequence[bytes], first_page: int, pages: int
    ) -> PageImport:
        raise PagesExhausted("an sglang server takes no KV from elsewhere")

    def _close_session(self, session_id: str) -> None:
        if self._task is not None:
            self._tasks.start_soon(self._try, self._client.close_session, session_id, name="close")

    # -- reports ------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        return self._load(self._info.capacity_pages, 0)

    def check_integrity(self) -> None:
        """There are no pages here."""


class _Unnamed:
    """Pages that nobody asks for by name."""

    def extend(self, tokens: Sequence[int]) -> None:
        pass


class _NoExport:
    """An empty :class:`workers.engines.port.PageExport`."""

    pages: Sequence[PageMeta] = ()

    def view(self, index: int) -> memoryview:
        raise IndexError(f"page {index} of none")

    def release(self) -> None:
        pass


def _info(config: SglangServerConfig, folder: Path, facts: ServerFacts) -> EngineInfo:
    model = json.loads((folder / "config.json").read_text())
    room = facts.max_total_tokens - facts.page_size - 1
    limit = min(facts.context_tokens, facts.max_input_tokens, room)
    eos = model.get("eos_token_id")
    return EngineInfo(
        engine="sglang-server",
        model=folder.name,
        vocab_size=int(model["vocab_size"]),
        max_context_tokens=min(limit, config.max_context_tokens or limit),
        page_size=facts.page_size,
        capacity_pages=facts.max_total_tokens // facts.page_size,
        page_bytes=0,
        kv_fingerprint=uuid.uuid4().bytes,
        max_running=config.max_running,
        max_queued=config.max_queued,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )
