"""The thread that sglang runs on: requests, their cancelling, and what asks for its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from workers.engines.port import EngineFailed
from workers.engines.sglang.runtime import Facts, Runtime
from workers.engines.sglang_requests.generations import Chunk, Request

pytestmark = pytest.mark.anyio

FACTS = Facts(
    max_total_tokens=1024,
    max_input_tokens=1000,
    context_tokens=1000,
    vocab_size=100,
    eos_token_ids=(2,),
    dtype="torch.float32",
    arguments={},
)


class FakeRuntime(Runtime):
    """Has no sglang on its thread. Every request is answered once, and then for ever not."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.ends: list[EngineFailed] = []
        self.closed: list[str] = []
        """Requests whose generator was closed."""
        self.starts = True
        super().__init__(
            SimpleNamespace(device="cpu"),
            events="",
            replay="",
            on_chunk=self.chunks.append,
            on_events=lambda batch: None,
            on_end=self.ends.append,
        )

    async def _main(self) -> None:
        self._own, self._quit = asyncio.get_running_loop(), asyncio.Event()
        async with anyio.create_task_group() as self._tasks:
            if self.starts:
                self._post(self._started, FACTS)
            await self._quit.wait()
            self._tasks.cancel_scope.cancel()

    async def _answers(self, request: Request) -> AsyncGenerator[dict[str, Any]]:
        try:
            meta = {"cached_tokens": 0, "finish_reason": None}
            yield {"output_ids": [7], "meta_info": meta}
            await anyio.sleep_forever()
        finally:
            self.closed.append(request.rid)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A SIGQUIT ends nothing else."""
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGQUIT, before)


@pytest.fixture
async def runtime() -> AsyncIterator[FakeRuntime]:
    it = FakeRuntime()
    assert await it.start() == FACTS
    yield it
    await it.aclose()


def request(rid: str) -> Request:
    return Request(rid, [1], {}, "", "", 0)


async def until(condition: Any) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_a_cancelled_request_is_given_up_by_sglang(runtime: FakeRuntime) -> None:
    runtime.generate(request("a"))
    runtime.generate(request("b"))
    await until(lambda: len(runtime.chunks) == 2)
    runtime.abort("a")
    await until(lambda: runtime.closed == ["a"])
    runtime.abort("a")
    runtime.abort("unknown")


async def test_so_is_one_that_is_cancelled_at_once(runtime: FakeRuntime) -> None:
    runtime.generate(request("a"))
    runtime.abort("a")
    runtime.generate(request("b"))
    await until(lambda: [chunk.rid for chunk in runtime.chunks][-1:] == ["b"])
    assert runtime.closed == ["a"]


async def test_what_asks_for_an_end_gets_it(runtime: FakeRuntime) -> None:
    os.kill(os.getpid(), signal.SIGQUIT)
    await until(lambda: runtime.ends)
    assert "asks to be ended" in str(runtime.ends[0])


async def test_so_does_what_asks_during_the_start() -> None:
    it = FakeRuntime()
    it.starts = False
    asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGQUIT)
    with (
        anyio.fail_after(10),
        pytest.raises(EngineFailed, match=r"did not start.*asks to be ended"),
    ):
        await it.start()
    await it.aclose()


async def test_once_closed_nothing_is_told(runtime: FakeRuntime) -> None:
    await runtime.aclose()
    runtime._on_quit(signal.SIGQUIT, None)
    await anyio.wait_all_tasks_blocked()
    assert runtime.ends == []
