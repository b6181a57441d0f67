"""Replicas over gRPC: one channel per endpoint, opened early and kept, and errors as ours.

No retries here: a call that failed is decided on by the orchestration, which knows the epochs.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from grpc import aio
from sessile.v1 import replica_pb2 as pb

from gateway.app.ports import ReplicaLost
from gateway.config import GatewayConfig
from gateway.core.errors import SessileError
from gateway.rpc.status import error_from_rpc, has_details
from gateway.security.tls import InsecureEndpoint, Tls, dialled
from gateway.telemetry.propagation import injected

log = logging.getLogger(__name__)

SERVICE = "/sessile.v1.ReplicaService/"

GONE_SIGNS = (
    "connection refused",
    "connection reset",
    "socket closed",
    "broken pipe",
    "no such file or directory",
)
"""What gRPC says when the peer's operating system refused or ended the connection without the
orderly GOAWAY of a server that stops: the process is gone."""

NOT_CONNECTED = "failed to connect"
"""What gRPC says of a connection that ended before it was made."""

_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)
"""Codes that the transport makes up when a connection breaks; with our details they are answers."""

T = TypeVar("T")

NOWHERE = "unix:/nowhere"
"""In the place of an address that must not be called."""


def translate(error: aio.AioRpcError, *, tls: bool = False) -> SessileError:
    """The replica's own error if it sent one, else what happened to the connection. With ``tls``, a
    connection that ends before it was made was refused for its certificate, perhaps: the process
    is there, so only a refused connection is a sign of its end."""
    if has_details(error) or error.code() not in _LOST:
        return error_from_rpc(error)
    details = error.details() or error.code().name
    handshake = tls and NOT_CONNECTED in details.lower()
    signs = GONE_SIGNS[:1] if handshake else GONE_SIGNS
    refused = error.code() is grpc.StatusCode.UNAVAILABLE and any(
        sign in details.lower() for sign in signs
    )
    return ReplicaLost(details, refused=refused)


class GrpcReplicaClient:
    """Implements ``ReplicaClient`` over one channel, which it keeps open while it is referred to:
    by its table, by whoever uses it, by a call under way."""

    def __init__(
        self, channel: aio.Channel, tls: Tls | None = None, refusal: InsecureEndpoint | None = None
    ) -> None:
        self.channel = channel
        self.tls = tls
        self.refused = refusal is not None
        self.generation = tls.generation if tls is not None else 0
        """Of the certificates that the channel was made with."""
        # Raw bytes: a turn's stream is relayed without being parsed.
        self._dispatch_turn: Any = channel.unary_stream(
            SERVICE + "DispatchTurn",
            request_serializer=pb.DispatchTurnRequest.SerializeToString,
            response_deserializer=None,
        )

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise ReplicaLost(str(refusal), refused=False)

        def method(name: str, answer: Callable[[bytes], T]) -> Callable[..., Awaitable[T]]:
            if refusal is not None:
                return refuse
            return channel.unary_unary(
                SERVICE + name,
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=answer,
            )

        if refusal is not None:
            self._dispatch_turn = refuse

        self._stop_turn = method("StopTurn", pb.StopTurnResponse.FromString)
        self._hand_over = method("HandOver", pb.HandOverResponse.FromString)
        self._abort_hand_over = method("AbortHandOver", pb.AbortHandOverResponse.FromString)
        self._import_session = method("ImportSession", pb.ImportSessionResponse.FromString)
        self._release_session = method("ReleaseSession", pb.ReleaseSessionResponse.FromString)
        self._read_turns = method("ReadTurns", pb.ReadTurnsResponse.FromString)
        self._set_draining = method("SetDraining", pb.SetDrainingResponse.FromString)

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        call = self._dispatch_turn(request, timeout=timeout_s, metadata=injected())
        try:
            async for message in call:
                yield message
        except aio.AioRpcError as error:
            raise translate(error, tls=self.tls is not None) from error
        finally:
            call.cancel()

    async def stop_turn(self, request: pb.StopTurnRequest, timeout_s: float) -> pb.StopTurnResponse:
        return await self._unary(self._stop_turn, request, timeout_s)

    async def hand_over(self, request: pb.HandOverRequest, timeout_s: float) -> pb.HandOverResponse:
        return await self._unary(self._hand_over, request, timeout_s)

    async def abort_hand_over(
        self, request: pb.AbortHandOverRequest, timeout_s: float
    ) -> pb.AbortHandOverResponse:
        return await self._unary(self._abort_hand_over, request, timeout_s)

    async def import_session(
        self, request: pb.ImportSessionRequest, timeout_s: float
    ) -> pb.ImportSessionResponse:
        return await self._unary(self._import_session, request, timeout_s)

    async def release_session(
        self, request: pb.ReleaseSessionRequest, timeout_s: float
    ) -> pb.ReleaseSessionResponse:
        return await self._unary(self._release_session, request, timeout_s)

    async def read_turns(
        self, request: pb.ReadTurnsRequest, timeout_s: float
    ) -> pb.ReadTurnsResponse:
        return await self._unary(self._read_turns, request, timeout_s)

    async def set_draining(
        self, request: pb.SetDrainingRequest, timeout_s: float
    ) -> pb.SetDrainingResponse:
        return await self._unary(self._set_draining, request, timeout_s)

    async def _unary(self, call: Callable[..., Awaitable[T]], request: Any, timeout_s: float) -> T:
        try:
            return await call(request, timeout=timeout_s, metadata=injected())
        except aio.AioRpcError as error:
            raise translate(error, tls=self.tls is not None) from error


class GrpcReplicaClients:
    """Clients by endpoint, ``Tables.channels`` at most: the least recently used one is forgotten,
    and its channel closes when nothing uses it any more. It is not closed under a call: to grpc.aio
    that is a cancel of the call by its own side, which readers take for one of their task.

    Raises OSError or ValueError for certificates that cannot be used."""

    def __init__(self, config: GatewayConfig) -> None:
        self._limit = config.tables.channels
        own = config.security.towards_replicas
        self._tls = Tls(own) if own is not None else None
        self._allow_insecure = config.security.allow_insecure
        size = config.admission.max_message_bytes
        self._options: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", size),
            ("grpc.max_receive_message_length", size),
            ("grpc.enable_retries", 0),
            *config.times.keepalive_options(),
            # Each channel has connections of its own, so that a new one to a restarted worker does
            # not inherit the back-off of the old one.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._clients: OrderedDict[str, GrpcReplicaClient] = OrderedDict()
        self._incarnations: dict[str, int] = {}

    def at(self, endpoint: str) -> GrpcReplicaClient:
        client = self._clients.get(endpoint)
        if client is not None and client.tls and client.generation != client.tls.generation:
            # The old certificate would be shown with every new connection of this channel.
            self._forget(endpoint)
            client = None
        if client is None:
            client = self._clients[endpoint] = self._new(endpoint)
            if len(self._clients) > self._limit:
                self._forget(next(iter(self._clients)))
        else:
            self._clients.move_to_end(endpoint)
        return client

    def warm(self, endpoint: str, incarnation: int) -> None:
        """Connects now, so that the first dispatch (perhaps a fail-over) does not have to. Another
        process at a known endpoint gets a new channel: the old one may be backing off."""
        if self._incarnations.get(endpoint, incarnation) != incarnation:
            self._forget(endpoint)
        client = self.at(endpoint)
        self._incarnations[endpoint] = incarnation
        if not client.refused:
            client.channel.get_state(try_to_connect=True)

    def _new(self, endpoint: str) -> GrpcReplicaClient:
        refusal = None
        try:
            address, tls = dialled(endpoint, self._tls, allow_insecure=self._allow_insecure)
        except InsecureEndpoint as error:
            log.warning("a replica is not called: %s", error)
            address, tls, refusal = NOWHERE, None, error
        if tls is None:
            channel = aio.insecure_channel(address, options=self._options)
        else:
            options = [*self._options, *tls.channel_options()]
            channel = aio.secure_channel(address, tls.channel_credentials(), options=options)
        return GrpcReplicaClient(channel, tls, refusal)

    def _forget(self, endpoint: str) -> None:
        self._incarnations.pop(endpoint, None)
        self._clients.pop(endpoint, None)

    async def aclose(self) -> None:
        """Closes every channel at once."""
        while self._clients:
            _, client = self._clients.popitem()
            await client.channel.close()
