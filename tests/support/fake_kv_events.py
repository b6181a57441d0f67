"""A publisher of KV events that speaks as sglang's does (PUB, and a ROUTER for what was missed)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import zmq
import zmq.asyncio

SUBSCRIBED = b"\x01"
END = (-1).to_bytes(8, "big", signed=True)


class FakeKvEvents:
    """It is an XPUB, which knows when somebody listens, and the same as a PUB to whom does."""

    def __init__(self, publisher: Any, replay: Any, kept: int) -> None:
        self._publisher, self._replay = publisher, replay
        self._kept = kept
        self._buffer: list[tuple[int, bytes]] = []
        self._count = 0
        self.asked: list[int] = []
        """Numbers from which on batches were asked for again."""

    async def heard(self) -> None:
        """Waits until somebody has subscribed."""
        with anyio.fail_after(10):
            while not (await self._publisher.recv()).startswith(SUBSCRIBED):
                pass

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        payload = msgspec.msgpack.encode([0.0, events, 0])
        number, self._count = self._count, self._count + 1
        self._buffer = [*self._buffer, (number, payload)][-self._kept :]
        if not lost:
            await self._publisher.send_multipart([b"", number.to_bytes(8, "big"), payload])

    async def serve(self) -> None:
        while True:
            who, _, first = await self._replay.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            for number, payload in self._buffer:
                if number >= self.asked[-1]:
                    batch = number.to_bytes(8, "big"), payload
                    await self._replay.send_multipart([who, b"", b"", *batch])
            await self._replay.send_multipart([who, b"", b"", END, b""])


@asynccontextmanager
async def fake_kv_events(events: str, replay: str, kept: int = 100) -> AsyncIterator[FakeKvEvents]:
    """At these addresses of ZeroMQ, until the end of the context. The last ``kept`` batches can be
    had again."""
    context: Any = zmq.asyncio.Context()
    publisher, router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    try:
        publisher.bind(events)
        router.bind(replay)
        fake = FakeKvEvents(publisher, router, kept)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fake.serve)
            yield fake
            tasks.cancel_scope.cancel()
    finally:
        context.destroy(linger=0)
