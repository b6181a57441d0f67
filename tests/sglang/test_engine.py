"""What is sglang's own: its traces, its storages, its retention."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from tests.sglang.engines import SglangHarness
from tests.support.otlp import receiver
from workers.engines.model_store import model_folder
from workers.engines.port import EngineFailed
from workers.engines.registry import create_backend
from workers.engines.sglang.config import SglangConfig

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@asynccontextmanager
async def running(**options: str) -> AsyncIterator[SglangHarness]:
    """A real engine for one test, of which no process is left."""
    from workers.engines.sglang.engine import SglangEngine

    others = sglang_processes()

    usual = {"max_total_tokens": "2048", "max_running": "4", "host_pages": "256"}
    config = SglangConfig.from_options({**usual, **options})
    engine = SglangEngine(config, model_folder(), anyio.current_time)
    harness = SglangHarness(engine)
    try:
        await engine.start(harness.on_step, harness.failures.append)
        yield harness
        engine.check_integrity()
    finally:
        await engine.aclose()
    assert sglang_processes() <= others


def sglang_processes() -> set[psutil.Process]:
    """Those of this process's engines."""
    children = {child: " ".join(child.cmdline()) for child in psutil.Process().children()}
    return {
        child
        for child, command in children.items()
        if "sglang" in command and "resource_tracker" not in command  # Python's own, for good
    }


async def test_its_spans_are_in_the_trace_of_the_turn() -> None:
    with receiver() as traces:
        endpoint = traces.endpoint.removeprefix("http://")
        async with running(enable_trace="true", otlp_traces_endpoint=endpoint) as it:
            trace = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
            await it.generate(it.prompt(1, 40), 4, trace=trace)
            await traces.until(lambda: len(traces.in_trace(TRACE_ID)) > 2)


@pytest.mark.essential
async def test_it_starts_without_any_option() -> None:
    engine = create_backend("sglang", {}, anyio.current_time).engine
    harness = SglangHarness(engine)
    try:
        await engine.start(harness.on_step, harness.failures.append)
        assert len((await harness.generate(harness.prompt(1, 40), 4)).tokens) == 4
    finally:
        await engine.aclose()


async def test_replicas_may_share_a_storage_of_its_own(tmp_path: Path) -> None:
    own = {"storage": "own", "hicache_storage_backend": "file"}
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(tmp_path)
    try:
        async with running(**own) as it:
            prompt = it.prompt(1, 100)
            output = await it.generate(prompt, 4)
            assert it.engine.info.page_bytes == 0
            assert it.engine.resident_pages(it.hashes(prompt)) == 0
            assert len(it.engine.export_pages(it.hashes(prompt)).pages) == 0
            assert it.engine.reusable_pages(it.hashes(prompt)) == 6
            for _ in range(100):
                if len(os.listdir(tmp_path)) >= 6:
                    break
                await anyio.sleep(0.1)  # it writes behind the scenes
        async with running(**own) as other:
            there = await other.generate(prompt, 4)
            assert there.tokens == output.tokens
            assert there.cached_tokens == 96
        other_kv = {"json_model_override_args": '{"rope_theta": 5000}'}
        async with running(**own, **other_kv) as stranger:
            assert (await stranger.generate(prompt, 4)).cached_tokens == 0
    finally:
        del os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"]


async def test_what_a_session_keeps_is_evicted_last_and_its_end_ends_that() -> None:
    async with running(max_total_tokens="512", host_pages="32") as it:
        kept, other = it.prompt(1, 97), it.prompt(2, 97)
        await it.generate(kept, 1, retention_id="kept")
        await it.generate(other, 1)
        it.engine.pin("kept", it.hashes(kept), 60.0)

        async def press(*seeds: int) -> None:
            for seed in seeds:
                await it.generate(it.prompt(seed, 97), 1)

        await press(*range(3, 21))  # more than the device and sglang's host memory hold
        assert it.engine.held_by_sglang(it.hashes(kept)) == 6
        assert it.engine.held_by_sglang(it.hashes(other)) < 6
        it.engine.unpin("kept")
        await press(*range(21, 39))
        assert it.engine.held_by_sglang(it.hashes(kept)) < 6


async def test_an_argument_that_sglang_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(EngineFailed, match="no_such_thing"):
        async with running(no_such_thing="1"):
            pass


async def test_ranks_with_other_kv_under_equal_keys_are_refused() -> None:
    with pytest.raises(EngineFailed, match="dp_size must be 1"):
        async with running(dp_size="2"):
            pass


async def test_a_pool_smaller_than_the_device_is_refused() -> None:
    with pytest.raises(EngineFailed, match="host_memory_mb"):
        async with running(host_pages="4"):
            pass
