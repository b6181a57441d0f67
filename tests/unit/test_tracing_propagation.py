"""A caller's trace goes on through a gateway to the replica, and from replica to replica."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import session_pb2, types_pb2

from gateway.app.admission import Gate
from gateway.config import GatewayConfig
from gateway.rpc.auth import HeaderTenant
from gateway.rpc.replica_client import GrpcReplicaClients
from gateway.rpc.serving import Serving
from workers.rpc import SERVICE, GrpcPeers

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SENT = (("traceparent", TRACEPARENT), ("tracestate", "vendor=1"))
CALLER = "/test.Gateway/"


class Replica:
    """Keeps the metadata of each call; answers with nothing."""

    def __init__(self) -> None:
        self.heard: dict[str, Mapping[str, str | bytes]] = {}

    def add_to(self, server: aio.Server) -> None:
        def unary(name: str) -> Any:
            async def handler(_: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
                self.heard[name] = dict(context.invocation_metadata() or ())
                return b""

            return grpc.unary_unary_rpc_method_handler(handler)

        async def dispatch(_: bytes, context: aio.ServicerContext[Any, Any]) -> None:
            self.heard["DispatchTurn"] = dict(context.invocation_metadata() or ())

        methods = {name: unary(name) for name in ("StopTurn", "ExportKv")}
        methods["DispatchTurn"] = grpc.unary_stream_rpc_method_handler(dispatch)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


@asynccontextmanager
async def gateway_before(replica: Replica) -> AsyncIterator[Any]:
    """A channel to a gateway's calls, each of which calls the replica."""
    clients, peers = GrpcReplicaClients(GatewayConfig()), GrpcPeers()
    server = aio.server()
    replica.add_to(server)
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"

    async def stop(_: str, __: Message) -> Message:
        return await clients.at(endpoint).stop_turn(pb.StopTurnRequest(), 5.0)

    async def export(_: str, __: Message) -> Message:
        return await peers.export_kv(endpoint, pb.ExportKvRequest(), 5.0)

    async def run(_: str, __: Message, left: Any, sink: Any) -> None:
        async for message in clients.at(endpoint).dispatch_turn(pb.DispatchTurnRequest(), 5.0):
            await sink(message)

    serving = Serving(HeaderTenant(), Gate("calls", 9, 1, 1.0), Gate("watches", 9, 1, 1.0))
    methods = {
        "Stop": serving.unary(stop, session_pb2.CancelTurnRequest),
        "Export": serving.unary(export, session_pb2.GetSessionRequest),
        "Run": serving.relayed(run, types_pb2.RunTurnRequest),
    }
    handler = grpc.method_handlers_generic_handler(CALLER.strip("/"), methods)
    server.add_generic_rpc_handlers((handler,))
    await server.start()
    try:
        async with aio.insecure_channel(endpoint) as channel:
            yield channel
    finally:
        await clients.aclose()
        await peers.aclose()
        await server.stop(None)


@pytest.mark.parametrize(
    ("call", "heard"), [("Stop", "StopTurn"), ("Export", "ExportKv"), ("Run", "DispatchTurn")]
)
async def test_the_callers_trace_reaches_the_replica(call: str, heard: str) -> None:
    replica = Replica()
    async with gateway_before(replica) as channel:
        if call == "Run":
            async for _ in channel.unary_stream(CALLER + call)(b"", metadata=SENT):
                pass
        else:
            await channel.unary_unary(CALLER + call)(b"", metadata=SENT)
    assert replica.heard[heard]["traceparent"] == TRACEPARENT
    assert replica.heard[heard]["tracestate"] == "vendor=1"


async def test_a_caller_without_a_trace_brings_none_and_inherits_none() -> None:
    replica = Replica()
    async with gateway_before(replica) as channel:
        await channel.unary_unary(CALLER + "Stop")(b"", metadata=SENT)
        await channel.unary_unary(CALLER + "Stop")(b"")
    assert "traceparent" not in replica.heard["StopTurn"]
