"""The replica API on the wire: a thin servicer over ReplicaApp, and calls to peers.

Nothing is decided here. Errors of the API become gRPC statuses with details and back by
``gateway/rpc/status.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from grpc import aio
from opentelemetry import context as otel_context
from opentelemetry import propagate
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import replica_pb2_grpc, types_pb2

from gateway.core.errors import SessileError
from gateway.rpc.status import abort, error_from_rpc
from workers.service import ReplicaApp

MAX_PEER_CHANNELS = 64
"""Channels to peers kept open; the least recently used is closed first."""
MAX_MESSAGE_BYTES = 16 << 20
"""Of one message in either direction; input, block hashes and transcripts stay well below."""

MIN_PING_INTERVAL_MS = 5_000
"""Half of what gateways leave between their pings."""

MAX_RPCS = 4096
"""Calls at once, of one connection and of all; over it gRPC refuses them itself."""
MAX_CONNECTIONS = 1024
"""From gateways and peers; over it a new one is closed unheard."""
HANDSHAKE_MS = 5_000
IDLE_CONNECTION_MS = 300_000
"""A connection without a call (a silent stream is one) for this long is closed."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

Request = TypeVar("Request")
Response = TypeVar("Response")
Context = aio.ServicerContext[Any, Any]


class ReplicaServicer(replica_pb2_grpc.ReplicaServiceServicer):
    """See ``workers/service.py`` for what each call does."""

    def __init__(self, app: ReplicaApp) -> None:
        self._app = app

    async def DispatchTurn(
        self, request: pb.DispatchTurnRequest, context: Context
    ) -> AsyncGenerator[types_pb2.TurnStream, None]:
        # The call has a task of its own, whose context the turn's run inherits: its span becomes a
        # child of the caller's. The context goes with the task and needs no detach.
        headers = dict(context.invocation_metadata() or ())
        otel_context.attach(propagate.extract(headers))
        try:
            async with aclosing(self._app.dispatch_turn(request)) as stream:
                async for message in stream:
                    yield message
        except SessileError as error:
            await abort(context, error)

    async def StopTurn(self, request: pb.StopTurnRequest, context: Context) -> pb.StopTurnResponse:
        return await _answer(self._app.stop_turn, request, context)

    async def HandOver(self, request: pb.HandOverRequest, context: Context) -> pb.HandOverResponse:
        return await _answer(self._app.hand_over, request, context)

    async def AbortHandOver(
        self, request: pb.AbortHandOverRequest, context: Context
    ) -> pb.AbortHandOverResponse:
        return await _answer(self._app.abort_hand_over, request, context)

    async def ExportKv(self, request: pb.ExportKvRequest, context: Context) -> pb.ExportKvResponse:
        return await _answer(self._app.export_kv, request, context)

    async def ImportSession(
        self, request: pb.ImportSessionRequest, context: Context
    ) -> pb.ImportSessionResponse:
        return await _answer(self._app.import_session, request, context)

    async def ReleaseSession(
        self, request: pb.ReleaseSessionRequest, context: Context
    ) -> pb.ReleaseSessionResponse:
        return await _answer(self._app.release_session, request, context)

    async def ReadTurns(
        self, request: pb.ReadTurnsRequest, context: Context
    ) -> pb.ReadTurnsResponse:
        return await _answer(self._app.read_turns, request, context)

    async def SetDraining(
        self, request: pb.SetDrainingRequest, context: Context
    ) -> pb.SetDrainingResponse:
        return await _answer(self._app.set_draining, request, context)


async def _answer(
    call: Callable[[Request], Awaitable[Response]], request: Request, context: Context
) -> Response:
    try:
        return await call(request)
    except SessileError as error:
        await abort(context, error)


class GrpcPeers:
    """PeerClient over gRPC. Owns its channels; close with :meth:`aclose`."""

    def __init__(self) -> None:
        self._channels: OrderedDict[str, aio.Channel] = OrderedDict()

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        channel = await self._channel(endpoint)
        stub = replica_pb2_grpc.ReplicaServiceStub(channel)
        try:
            return await stub.ExportKv(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def _channel(self, endpoint: str) -> aio.Channel:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = aio.insecure_channel(endpoint, options=OPTIONS)
            if len(self._channels) > MAX_PEER_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close(grace=None)
        self._channels.move_to_end(endpoint)
        return channel

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            while self._channels:
                _, channel = self._channels.popitem()
                await channel.close(grace=None)


def new_server(host: str, port: int) -> tuple[aio.Server, int]:
    """A server bound to host:port (0: any free port) but not started; and its port. Raises OSError
    if the address cannot be bound."""
    # Gateways ping while a stream is silent (a queued turn, a long prefill, a store that is away).
    # By default a server takes that for abuse and ends the connection.
    server = aio.server(
        maximum_concurrent_rpcs=MAX_RPCS,
        options=[
            *OPTIONS,
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ("grpc.max_concurrent_streams", MAX_RPCS),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", IDLE_CONNECTION_MS),
        ],
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    return server, bound
