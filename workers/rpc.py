"""The replica API on the wire: a table from method to ReplicaApp's calls, and calls to peers.

Nothing is decided here. Errors of the API become gRPC statuses with details and back by
``gateway/rpc/status.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
import grpc
from google.protobuf.message import Message
from grpc import aio
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import replica_pb2_grpc

from gateway.core.errors import SessileError, Unavailable
from gateway.rpc.late import LateServices
from gateway.rpc.status import abort, error_from_rpc, parsed
from gateway.security.tls import InsecureEndpoint, Tls, dialled
from gateway.telemetry.propagation import attach_caller, injected
from workers.config import join_address
from workers.service import ReplicaApp

SERVICE = pb.DESCRIPTOR.services_by_name["ReplicaService"].full_name

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

Request = TypeVar("Request", bound=Message)
Context = aio.ServicerContext[Any, Any]


def add_replica_service(server: aio.Server | LateServices, app: ReplicaApp) -> None:
    """The replica API; see ``workers/service.py`` for what each call does."""
    methods = {
        "DispatchTurn": _dispatch(app),
        "StopTurn": _unary(app.stop_turn, pb.StopTurnRequest),
        "HandOver": _unary(app.hand_over, pb.HandOverRequest),
        "AbortHandOver": _unary(app.abort_hand_over, pb.AbortHandOverRequest),
        "ExportKv": _unary(app.export_kv, pb.ExportKvRequest),
        "ImportSession": _unary(app.import_session, pb.ImportSessionRequest),
        "ReleaseSession": _unary(app.release_session, pb.ReleaseSessionRequest),
        "ReadTurns": _unary(app.read_turns, pb.ReadTurnsRequest),
        "SetDraining": _unary(app.set_draining, pb.SetDrainingRequest),
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, methods)
    server.add_generic_rpc_handlers((handler,))


def _dispatch(app: ReplicaApp) -> Any:
    async def handler(data: bytes, context: Context) -> AsyncGenerator[Message, None]:
        # The turn's run inherits this task's context: its span becomes a child of the caller's.
        attach_caller(context.invocation_metadata())
        try:
            request = parsed(pb.DispatchTurnRequest, data)
            async with aclosing(app.dispatch_turn(request)) as stream:
                async for message in stream:
                    yield message
        except SessileError as error:
            await abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handler, None, _serialized)


def _unary(call: Callable[[Request], Awaitable[Message]], kind: type[Request]) -> Any:
    async def handler(data: bytes, context: Context) -> Message:
        attach_caller(context.invocation_metadata())
        try:
            return await call(parsed(kind, data))
        except SessileError as error:
            await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(handler, None, _serialized)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


class GrpcPeers:
    """PeerClient over gRPC. Owns its channels; close with :meth:`aclose`. Endpoints that must not
    be called (see :func:`dialled`) are Unavailable."""

    def __init__(self, tls: Tls | None = None, *, allow_insecure: bool = False) -> None:
        self._tls = tls
        self._allow_insecure = allow_insecure
        self._generation = 0
        self._channels: OrderedDict[str, aio.Channel] = OrderedDict()

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        channel = await self._channel(endpoint)
        stub = replica_pb2_grpc.ReplicaServiceStub(channel)
        try:
            return await stub.ExportKv(request, timeout=timeout_s, metadata=injected())
        except aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def _channel(self, endpoint: str) -> aio.Channel:
        if self._tls is not None and self._tls.generation != self._generation:
            # Channels would show the old certificate with every new connection.
            self._generation = self._tls.generation
            self._channels.clear()  # each closes when the last call on it has ended
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = self._new(endpoint)
            if len(self._channels) > MAX_PEER_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close(grace=None)
        self._channels.move_to_end(endpoint)
        return channel

    def _new(self, endpoint: str) -> aio.Channel:
        try:
            address, tls = dialled(endpoint, self._tls, allow_insecure=self._allow_insecure)
        except InsecureEndpoint as error:
            raise Unavailable(str(error)) from error
        if tls is None:
            return aio.insecure_channel(address, options=OPTIONS)
        options = [*OPTIONS, *tls.channel_options()]
        return aio.secure_channel(address, tls.channel_credentials(), options=options)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            while self._channels:
                _, channel = self._channels.popitem()
                await channel.close(grace=None)


def new_server(host: str, port: int, tls: Tls | None = None) -> tuple[aio.Server, int]:
    """A server bound to host:port (0: any free port) but not started; and its port. With ``tls``
    only callers with a certificate of its ca are heard. Raises OSError if the address cannot be
    bound."""
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
            ("grpc.so_reuseport", 0),  # else two workers with one port would both seem to serve
        ],
    )
    address = join_address(host, port)
    try:
        if tls is None:
            return server, server.add_insecure_port(address)
        credentials = tls.server_credentials(require_client_certificate=True)
        return server, server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
