"""Channels to peers: bounded, and the least recently used is closed."""

from __future__ import annotations

from typing import Any

import pytest
from grpc import aio
from sessile.v1 import replica_pb2 as pb

from workers.rpc import MAX_PEER_CHANNELS, GrpcPeers

pytestmark = pytest.mark.anyio


async def test_channels_to_peers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Channel] = {}

    class Channel:
        closed = False

        def __init__(self, endpoint: str) -> None:
            assert endpoint not in opened or opened[endpoint].closed
            opened[endpoint] = self

        def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
            async def answer(*args: Any, **kwargs: Any) -> pb.ExportKvResponse:
                return pb.ExportKvResponse()

            return answer

        unary_stream = unary_unary

        async def close(self, grace: float | None) -> None:
            self.closed = True

    monkeypatch.setattr(aio, "insecure_channel", lambda endpoint, options: Channel(endpoint))
    peers = GrpcPeers()

    async def call(endpoint: str) -> None:
        await peers.export_kv(endpoint, pb.ExportKvRequest(), 1.0)

    for index in range(MAX_PEER_CHANNELS):
        await call(f"127.0.0.1:{index + 1}")
    await call("127.0.0.1:1")
    assert not any(channel.closed for channel in opened.values())
    await call("127.0.0.1:9999")
    assert [name for name, channel in opened.items() if channel.closed] == ["127.0.0.1:2"]
    await peers.aclose()
    assert all(channel.closed for channel in opened.values())
