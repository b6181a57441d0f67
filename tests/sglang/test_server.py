"""A replica before a real server of sglang's, started by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import anyio
import psutil
import pytest

from statestore.embedded import dies_with_parent
from tests.support.engines import EngineHarness
from workers.engines.model_store import model_folder
from workers.engines.port import EngineFinish, PagesExhausted
from workers.engines.sglang_server.config import SglangServerConfig
from workers.engines.sglang_server.engine import SglangServerEngine

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

START_S = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Server:
    """Where a real one answers."""

    url: str
    events: str
    replay: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, events, replay = free_port(), free_port(), free_port()
    at = Server(
        *(
            f"{kind}://127.0.0.1:{n}"
            for kind, n in zip(("http", "tcp", "tcp"), (port, events, replay), strict=True)
        )
    )
    publisher = {
        "publisher": "zmq",
        "endpoint": at.events,
        "bind": True,
        "replay_endpoint": at.replay,
    }
    arguments = {
        "--kv-events-config": json.dumps(publisher),
        "--model-path": str(model_folder()),
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--dtype": "float32",
        "--max-total-tokens": "2048",
        "--max-running-requests": "4",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    words = [word for pair in arguments.items() for word in pair]
    words += ["--sleep-on-idle", "--skip-tokenizer-init", "--enable-session-radix-cache"]
    command = [sys.executable, "-m", "sglang.launch_server", *words]
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            dies_with_parent(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    give_up_at = time.monotonic() + START_S
    try:
        while not _healthy(at.url):
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < give_up_at, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield at
    finally:
        # One that is ended in the middle of its start leaves its processes behind.
        alive = server.poll() is None
        children = psutil.Process(server.pid).children(recursive=True) if alive else []
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _idle(address: str) -> bool:
    """Whether the server computes nothing any more within a few seconds of the half minute that the
    longest generation takes: only then it empties its cache."""
    request = urllib.request.Request(f"{address}/flush_cache?timeout=5", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.fixture
async def it(server: Server) -> AsyncIterator[EngineHarness]:
    folder = model_folder()
    config = SglangServerConfig(
        url=server.url, model=str(folder), events=server.events, replay=server.replay
    )
    engine = SglangServerEngine(config, folder)
    harness = EngineHarness(engine)
    await engine.start(harness.on_step, harness.failures.append)
    yield harness
    assert not harness.failures
    await engine.aclose()


async def test_generations_repeat_stop_and_reuse_their_prefix(it: EngineHarness) -> None:
    prompt = it.prompt(1, 60)
    first = await it.generate(prompt, 12, retention_id="s")
    assert (len(first.tokens), first.finish) == (12, EngineFinish.MAX_TOKENS)
    again = await it.generate(prompt, 12)
    assert again.tokens == first.tokens
    assert again.cached_tokens
    stop = first.tokens[5]
    stopped = await it.generate(prompt, 12, stop_token_ids=frozenset({stop}))
    assert stopped.tokens == first.tokens[: first.tokens.index(stop) + 1]
    other = await it.generate(prompt, 12, namespace=b"another tenant")
    assert (other.tokens, other.cached_tokens) == (first.tokens, 0)


async def test_a_cancelled_generation_ends_at_the_server_too(it: EngineHarness) -> None:
    running = it.request(it.prompt(2, 60), 1000)
    await it.until(running, 3)
    it.engine.cancel(running)
    assert (await it.generate(it.prompt(3, 9), 4)).finish is EngineFinish.MAX_TOKENS
    assert it.engine.load().running == 0


async def test_one_cancelled_at_once_does_not_run_on_at_the_server(
    it: EngineHarness, server: Server
) -> None:
    sent = it.request(it.prompt(6, 60), 1900)
    await anyio.sleep(0.02)  # on its way
    it.engine.cancel(sent)
    it.engine.cancel(it.request(it.prompt(7, 60), 1900))
    assert await anyio.to_thread.run_sync(_idle, server.url)


async def test_what_its_cache_holds_its_events_tell(it: EngineHarness) -> None:
    prompt = it.prompt(8, 70)
    hashes = it.hashes(prompt)
    assert it.engine.reusable_pages(hashes) == 0
    await it.generate(prompt, 1)
    for _ in range(100):
        if it.engine.reusable_pages(hashes) == len(hashes):
            break
        await anyio.sleep(0.05)  # they come when the server has time
    assert it.engine.reusable_pages(hashes) == len(hashes)
    again = await it.generate(prompt, 1)
    assert again.cached_tokens == 69  # in pages of one token


async def test_a_parked_generation_goes_on_the_same(it: EngineHarness) -> None:
    prompt = it.prompt(4, 20)
    expected = await it.generate(prompt, 20)
    parked = it.request(prompt, 20)
    await it.until(parked, 3)
    it.engine.park(parked)
    await it.generate(it.prompt(5, 9), 4)
    it.engine.unpark(parked)
    assert (await it.end_of(parked)).tokens == expected.tokens


async def test_its_kv_cannot_be_had(it: EngineHarness) -> None:
    hashes = it.hashes(it.prompt(1, 60))
    assert len(it.engine.export_pages(hashes).pages) == 0
    with pytest.raises(PagesExhausted):
        it.engine.reserve_import(hashes, 0, 1)
