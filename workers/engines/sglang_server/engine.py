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
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from workers.engines.sglang_requests.base import RequestEngine
from workers.engines.sglang_requests.events import ResidentView, follow_events
from workers.engines.sglang_requests.generations import (
    SGLANG_VERSIONS,
    Chunk,
    Generations,
    Request,
    chunk_of,
)
from workers.engines.sglang_server.client import ServerFacts, SglangClient
from workers.engines.sglang_server.config import SglangServerConfig
from workers.kv.blocks import block_hashes

log = logging.getLogger(__name__)

ALIVE_PERIOD_S = 2.0
PROBE_PERIOD_S = 30.0
UNHEALTHY = 3
"""Times in a row that a server does not answer, or not generate, before it is taken for dead."""


class SglangServerEngine(RequestEngine):
    """See the port :class:`workers.engines.port.Engine`."""

    def __init__(self, config: SglangServerConfig, folder: Path) -> None:
        """``folder`` of the server's model."""
        super().__init__()
        self._config = config
        self._folder = folder
        self._task: asyncio.Task[None] | None = None
        self._streams: dict[str, anyio.CancelScope] = {}
        """Of the requests that the server has."""

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
            self._info = _info(config, self._folder, self._facts)
        except EngineFailed:
            await self._client.aclose()
            raise
        _warn_of_version(self._facts)
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
        try:
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._watch, name="alive")
                self._tasks.start_soon(self._probe, name="health")
                if self._config.events:
                    self._tasks.start_soon(self._listen, name="events")
                ready.set()
                await anyio.sleep_forever()
        except Exception as error:
            log.exception("the engine before the sglang server failed")
            self._fail(
                EngineFailed(
                    f"what follows the sglang server {self._config.url} failed: {error!r}; restart "
                    "the replica"
                )
            )

    async def _watch(self) -> None:
        """Whether the server is there, and is the one it was."""
        missed, another = 0, False
        while missed < UNHEALTHY:
            await anyio.sleep(ALIVE_PERIOD_S)
            if not await self._client.answers():
                missed, another = missed + 1, True
                continue
            missed = 0
            another = another and not await self._is_the_same()
        self._fail(
            EngineFailed(
                f"the sglang server {self._config.url} does not answer; restart the replica when "
                "it does"
            )
        )

    async def _is_the_same(self) -> bool:
        """Whether the server, which may have been started anew, is what this engine was made for:
        if not, that is its end. False also if the server cannot be asked now."""
        try:
            facts = await self._client.facts()
            info = _info(self._config, self._folder, facts)
        except EngineFailed as error:
            log.warning("what became of the sglang server is not known yet: %s", error)
            return False
        was = self._info
        as_it_was = replace(
            info,
            kv_fingerprint=was.kv_fingerprint,
            capacity_pages=was.capacity_pages,
            max_context_tokens=min(info.max_context_tokens, was.max_context_tokens),
        )
        if as_it_was != was:
            self._fail(
                EngineFailed(
                    f"the sglang server {self._config.url} came back with other limits; restart "
                    "the replica"
                )
            )
        if facts != self._facts:
            _warn_of_version(facts)
        self._facts = facts
        return True

    async def _probe(self) -> None:
        """Whether the server generates. A long prompt of ours explains that it does not; if its
        scheduler hangs meanwhile, sglang's own watchdog ends the server."""
        failed = 0
        while failed < UNHEALTHY:
            await anyio.sleep(PROBE_PERIOD_S)
            busy = self._generations.prefill_tokens > 0
            well = await self._client.generates()
            busy = busy or self._generations.prefill_tokens > 0
            failed = 0 if well or busy else failed + 1
        self._fail(
            EngineFailed(
                f"the sglang server {self._config.url} says that it does not generate; restart the "
                "replica when it does"
            )
        )

    async def _listen(self) -> None:
        events = follow_events(self._config.events, self._config.replay)
        async with contextlib.aclosing(events) as batches:
            async for batch in batches:
                self._view.take(batch)

    # -- generations --------------------------------------------------------------------------

    def generate(self, request: Request) -> None:
        """As a :class:`workers.engines.sglang_requests.generations.Sender`."""
        scope = self._streams[request.rid] = anyio.CancelScope()
        self._tasks.start_soon(self._stream, request, scope, name=request.rid)

    def abort(self, rid: str) -> None:
        scope = self._streams.get(rid)
        if scope is not None:
            scope.cancel()

    async def _stream(self, request: Request, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                await self._take_answers(request)
        except Exception as error:  # noqa: BLE001 - this request alone failed, whatever it is
            detail = f"the sglang server: {type(error).__name__}: {error}"
            self._generations.take(Chunk(request.rid, (), 0, 0.0, None, detail))
        finally:
            del self._streams[request.rid]
        if scope.cancelled_caught:
            # The server aborts what nobody reads, if no proxy hides that. Only now: an abort that
            # overtook its request would be forgotten.
            await self._try(self._client.abort, request.rid)

    async def _take_answers(self, request: Request) -> None:
        since = self._loop.time()
        async with contextlib.aclosing(self._client.stream(request, self._facts)) as answers:
            async for answer in answers:
                before, since = since, self._loop.time()
                self._generations.take(chunk_of(request.rid, answer, since - before))

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
        running = self._task is not None and not self._task.done()
        if running and self._failure is None and self._facts.tags_sessions:
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
    vocab_size, eos_token_ids = _vocabulary(folder)
    room = facts.max_total_tokens - facts.page_size - 1
    limit = min(facts.context_tokens, facts.max_input_tokens, room)
    return EngineInfo(
        engine="sglang-server",
        model=folder.name,
        vocab_size=vocab_size,
        max_context_tokens=min(limit, config.max_context_tokens or limit),
        page_size=facts.page_size,
        capacity_pages=facts.max_total_tokens // facts.page_size,
        page_bytes=0,
        kv_fingerprint=uuid.uuid4().bytes,
        max_running=config.max_running,
        max_queued=config.max_queued,
        eos_token_ids=eos_token_ids,
    )


def _vocabulary(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Its size, and the tokens at which sglang ends a generation by itself."""
    model = _json(folder / "config.json")
    text = {**model, **(model.get("text_config") or {})}  # of a model of more than text
    if not isinstance(text.get("vocab_size"), int):
        raise EngineFailed(f"{folder}/config.json gives no vocab_size; is it the model's folder?")
    generation = folder / "generation_config.json"
    ends: set[int] = set()
    for settings in (model, text, _json(generation) if generation.exists() else {}):
        eos = settings.get("eos_token_id")
        ends.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return text["vocab_size"], tuple(sorted(ends))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise EngineFailed(f"{path} cannot be read: {error}") from error


def _warn_of_version(facts: ServerFacts) -> None:
    if facts.version not in SGLANG_VERSIONS:
        log.warning(
            "the server is sglang %s; this engine was tested with %s",
            facts.version,
            ", ".join(SGLANG_VERSIONS),
        )
