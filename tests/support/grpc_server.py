"""A real gRPC server on a free port of loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc import aio


@asynccontextmanager
async def listening(server: aio.Server) -> AsyncIterator[aio.Channel]:
    """Serves what was added to ``server``; a channel to it."""
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
