"""What becomes of an sglang server, and what its replica makes of it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.support.engines import EngineHarness
from tests.support.fake_kv_events import fake_kv_events
from tests.support.fake_sglang import FakeSglang, fake_sglang
from tests.unit.test_sglang_events import batch
from workers.engines.port import EngineFailed
from workers.engines.sglang_server import engine as engine_module
from workers.engines.sglang_server.config import SglangServerConfig
from workers.engines.sglang_server.engine import SglangServerEngine

pytestmark = pytest.mark.anyio

PAGE = 16


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeSglang]:
    monkeypatch.setattr(engine_module, "ALIVE_PERIOD_S", 0.005)
    monkeypatch.setattr(engine_module, "PROBE_PERIOD_S", 0.005)
    async with fake_sglang() as fake:
        yield fake


@pytest.fixture
def config(server: FakeSglang, tmp_path: Path) -> SglangServerConfig:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": 2}))
    return SglangServerConfig(url=server.url, model=str(tmp_path))


async def started(config: SglangServerConfig) -> EngineHarness:
    engine = SglangServerEngine(config, Path(config.model))
    harness = EngineHarness(engine)
    await engine.start(harness.on_step, harness.failures.append)
    return harness


@pytest.fixture
async def it(config: SglangServerConfig) -> AsyncIterator[EngineHarness]:
    harness = await started(config)
    yield harness
    await harness.engine.aclose()


async def failure_of(it: EngineHarness) -> str:
    """Why the engine failed; it takes nothing more, and ends."""
    with anyio.fail_after(10):
        while not it.failures:
            await anyio.lowlevel.checkpoint()
    with pytest.raises(EngineFailed):
        it.request([10], 1)
    (failure,) = it.failures
    return str(failure)


async def test_a_server_that_does_not_answer_is_the_end_of_the_replica(
    server: FakeSglang, it: EngineHarness
) -> None:
    server.away = math.inf
    assert "does not answer" in await failure_of(it)


async def test_a_server_that_does_not_generate_is_the_end_of_the_replica(
    server: FakeSglang, it: EngineHarness
) -> None:
    server.healthy = False
    assert "does not generate" in await failure_of(it)


async def test_a_long_prompt_is_no_reason_to_end(server: FakeSglang, it: EngineHarness) -> None:
    server.hold, server.hold_at = asyncio.Event(), 0
    server.healthy = False
    going = it.request([10], 2)
    with anyio.fail_after(10):
        while server.probes < 2 * engine_module.UNHEALTHY:
            await anyio.lowlevel.checkpoint()
    assert it.failures == []
    server.healthy = True
    server.hold.set()
    assert (await it.end_of(going)).tokens == (11, 12)


async def test_a_server_that_comes_back_the_same_is_used_on(
    server: FakeSglang, it: EngineHarness, caplog: pytest.LogCaptureFixture
) -> None:
    server.info.update(version="9.9", max_total_num_tokens=1030, incremental_streaming_output=True)
    server.away = 2
    with anyio.fail_after(10):
        while "the server is sglang 9.9" not in caplog.text:
            await anyio.lowlevel.checkpoint()
    assert (await it.generate([10], 3)).tokens == (11, 12, 13)
    assert it.failures == []


async def test_a_server_that_comes_back_another_is_the_end_of_the_replica(
    server: FakeSglang, it: EngineHarness
) -> None:
    server.info["page_size"] = 32
    server.away = 1
    assert "other limits" in await failure_of(it)


async def test_another_version_than_those_tested_is_told(
    server: FakeSglang, config: SglangServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await (await started(config)).engine.aclose()
    assert caplog.text == ""
    server.info["version"] = "0.6.1"
    await (await started(config)).engine.aclose()
    assert "the server is sglang 0.6.1; this engine was tested with 0.5." in caplog.text


async def test_what_its_cache_holds_is_told_until_it_begins_anew(
    config: SglangServerConfig, tmp_path: Path
) -> None:
    events, replay = (f"ipc://{tmp_path / name}" for name in ("events", "replay"))
    it = await started(replace(config, events=events, replay=replay))
    context = list(range(3 * PAGE))
    hashes = it.hashes(context)
    stored = {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": context[: 2 * PAGE],
        "block_size": PAGE,
        "cache_salt": b"tenant".hex(),
    }

    async def until(pages: int) -> None:
        with anyio.fail_after(10):
            while it.engine.reusable_pages(hashes) != pages:
                await anyio.lowlevel.checkpoint()

    async with fake_kv_events(events, replay) as publisher:
        await publisher.heard()
        await publisher.publish(stored)
        await until(2)
        assert it.engine.resident_pages(hashes) == 0
    await until(0)
    async with fake_kv_events(events, replay) as publisher:
        await publisher.publish({**stored, "block_hashes": [1], "token_ids": context[:PAGE]})
        await publisher.heard()
        await publisher.publish({**stored, "token_ids": [[1, 2]] * PAGE})
        await until(1)
    assert it.failures == []
    await it.engine.aclose()


async def test_what_goes_wrong_in_the_replica_itself_is_its_end_and_told(
    config: SglangServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(events: str, replay: str) -> AsyncIterator[bytes]:
        yield batch()
        raise OSError("no such socket")

    monkeypatch.setattr(engine_module, "follow_events", fails)
    it = await started(replace(config, events="tcp://127.0.0.1:1"))
    assert "no such socket" in await failure_of(it)
    it.engine.unpin("s")
    await it.engine.aclose()
