"""A replica before an sglang server that somebody else runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from tests.support.engines import EngineHarness
from tests.support.fake_sglang import FakeSglang, fake_sglang
from workers.engines.port import EngineFailed, EngineFinish, PagesExhausted
from workers.engines.sglang_server.config import SglangServerConfig
from workers.engines.sglang_server.engine import SglangServerEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server() -> AsyncIterator[FakeSglang]:
    async with fake_sglang() as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"vocab_size": 1000, "eos_token_id": [2, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def config_of(server: FakeSglang, folder: Path) -> SglangServerConfig:
    return SglangServerConfig(url=server.url, model=str(folder), api_key="secret", timeout_s=5.0)


@pytest.fixture
async def it(server: FakeSglang, folder: Path) -> AsyncIterator[EngineHarness]:
    engine = SglangServerEngine(config_of(server, folder), folder)
    harness = EngineHarness(engine)
    await engine.start(harness.on_step, harness.failures.append)
    yield harness
    await engine.aclose()


async def test_no_secret_is_in_what_is_said_of_a_server() -> None:
    assert "hunter2" not in repr(SglangServerConfig("http://h:1", "m", api_key="hunter2"))
    for url, told in (
        ("http://me:hunter2@h:1", "api_key is what"),
        ("ftp://me:hunter2@h:1", "must be like"),
    ):
        with pytest.raises(ValueError, match=told) as refused:
            SglangServerConfig(url, "m")
        assert "hunter2" not in str(refused.value)


async def test_it_is_what_its_server_says(it: EngineHarness, folder: Path) -> None:
    info = it.engine.info
    assert (info.engine, info.model) == ("sglang-server", folder.name)
    assert (info.page_size, info.capacity_pages, info.max_context_tokens) == (16, 64, 1007)
    assert (info.vocab_size, info.eos_token_ids) == (1000, (2, 3))


@pytest.mark.parametrize("incremental", [False, True])
async def test_a_generation_streams_what_is_new(
    server: FakeSglang, folder: Path, incremental: bool
) -> None:
    server.info["incremental_streaming_output"] = incremental
    engine = SglangServerEngine(config_of(server, folder), folder)
    it = EngineHarness(engine)
    await engine.start(it.on_step, it.failures.append)
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    output = await it.generate([10, 20], 5, retention_id="s", trace=trace)
    assert output.tokens == (21, 22, 23, 24, 25)
    assert (output.finish, output.cached_tokens) == (EngineFinish.MAX_TOKENS, 16)
    path, headers, body = server.asked[-1]
    assert (path, headers["authorization"]) == ("/generate", "Bearer secret")
    assert headers["traceparent"] == trace["traceparent"]
    assert (body["input_ids"], body["session_id"]) == ([10, 20], "s")
    assert body["cache_salt"] == b"tenant".hex()
    await engine.aclose()


async def test_a_cancelled_generation_is_aborted_at_the_server(
    server: FakeSglang, it: EngineHarness
) -> None:
    server.hold = asyncio.Event()
    running = it.request([10], 100)
    await it.until(running, 1)
    it.engine.cancel(running)
    await _until_asked(server, "/abort_request")
    rid = server.asked[1][2]["rid"]
    assert server.asked[-1][2] == {"rid": rid}
    assert server.left == [rid]


async def test_one_that_the_server_has_not_answered_yet_does_not_run_on_there(
    server: FakeSglang, it: EngineHarness
) -> None:
    """The server forgets an abort that overtakes its request."""
    server.hold, server.hold_at = asyncio.Event(), 0
    going = it.request([10], 100)
    await _until_asked(server, "/generate")
    it.engine.cancel(going)
    await _until_asked(server, "/abort_request")
    assert server.left == [server.asked[1][2]["rid"]]
    it.engine.cancel(it.request([10], 100))
    assert it.engine.load().running == 0
    server.hold.set()
    assert (await it.generate([10], 2)).tokens == (11, 12)
    asked = [body["rid"] for path, _, body in server.asked if path == "/generate"]
    assert len(asked) == 2  # the one that was cancelled at once never came here


async def test_a_refusal_and_a_broken_stream_end_the_generation_alone(
    server: FakeSglang, it: EngineHarness
) -> None:
    server.refusal = 400, b'{"error": "too long"}'
    refused = await it.generate([10], 4)
    assert refused.error is not None
    assert "too long" in refused.error
    server.refusal, server.break_after = None, 2
    broken = await it.generate([10], 4)
    assert (broken.tokens, broken.error is None) == ((11, 12), False)
    server.break_after, server.garbage = None, {"output_ids": [1], "meta_info": None}
    unreadable = await it.generate([10], 4)
    assert (unreadable.tokens, unreadable.error is None) == ((), False)
    server.garbage = None
    assert (await it.generate([10], 2)).tokens == (11, 12)


async def test_pages_cannot_be_had(it: EngineHarness) -> None:
    hashes = it.hashes([1] * 64)
    assert it.engine.resident_pages(hashes) == 0
    export = it.engine.export_pages(hashes)
    assert len(export.pages) == 0
    export.release()
    with pytest.raises(PagesExhausted):
        it.engine.reserve_import(hashes, 0, 4)


async def test_what_is_pinned_is_given_up_with_its_session(
    server: FakeSglang, it: EngineHarness
) -> None:
    it.engine.pin("s", it.hashes([1] * 64), 60.0)
    it.engine.unpin("s")
    await _until_asked(server, "/close_session")
    assert server.asked[-1][2] == {"session_id": "s"}


async def test_a_server_without_tags_is_told_of_no_session(
    server: FakeSglang, folder: Path
) -> None:
    server.info["enable_session_radix_cache"] = False
    engine = SglangServerEngine(config_of(server, folder), folder)
    it = EngineHarness(engine)
    await engine.start(it.on_step, it.failures.append)
    engine.pin("s", it.hashes([1] * 64), 60.0)
    engine.unpin("s")
    await it.generate([10], 1, retention_id="s")
    assert [path for path, _, _ in server.asked] == ["/server_info", "/generate"]
    assert "session_id" not in server.asked[-1][2]
    await engine.aclose()


async def test_what_is_no_sglang_server_is_refused(server: FakeSglang, folder: Path) -> None:
    del server.info["page_size"]
    with pytest.raises(EngineFailed, match="server_info is not"):
        await SglangServerEngine(config_of(server, folder), folder).start(print, print)
    gone = SglangServerConfig(url="http://127.0.0.1:1", model=str(folder))
    with pytest.raises(EngineFailed, match="cannot be asked"):
        await SglangServerEngine(gone, folder).start(print, print)


async def test_a_model_of_more_than_text_keeps_its_vocabulary_apart(
    server: FakeSglang, folder: Path
) -> None:
    nested = {"eos_token_id": 5, "text_config": {"vocab_size": 300, "eos_token_id": 7}}
    (folder / "config.json").write_text(json.dumps(nested))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    engine = SglangServerEngine(config_of(server, folder), folder)
    await engine.start(print, print)
    assert (engine.info.vocab_size, engine.info.eos_token_ids) == (300, (5, 7, 9))
    await engine.aclose()


@pytest.mark.parametrize("config", ["{}", "[1]", "no JSON"])
async def test_a_folder_that_is_no_models_is_refused(
    server: FakeSglang, folder: Path, config: str
) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(EngineFailed, match=r"config\.json"):
        await SglangServerEngine(config_of(server, folder), folder).start(print, print)


@pytest.mark.parametrize(
    "wrong", [{"url": "ftp://x"}, {"url": "nowhere"}, {"max_running": 0}, {"replay": "tcp://x:1"}]
)
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|of no use"):
        SglangServerConfig(**{"url": "http://x", "model": "m", **wrong})  # type: ignore[arg-type]


async def _until_asked(server: FakeSglang, path: str) -> None:
    with anyio.fail_after(10):
        while server.asked[-1][0] != path:
            await anyio.lowlevel.checkpoint()
