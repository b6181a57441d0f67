"""Connections to the gateways: which one is used, and how a failed call is repeated.

A client keeps to one gateway and goes to the next when that one fails. Only calls whose repeat has
no second effect are repeated; the wait between tries is drawn at random under a doubling ceiling
("full jitter"), never shorter than the server's RetryInfo asks for.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc import aio

from sessile import errors
from sessile.messages import Priority
from sessile.tracing import Tracing
from sessile.v1 import fleet_pb2_grpc, session_pb2_grpc

log = logging.getLogger("sessile")

Request = TypeVar("Request")
Response = TypeVar("Response")

TENANT_KEY = "x-sessile-tenant"
MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_MS = 10_000
STREAM_S = 3600.0
"""A followed stream is opened anew after this time at the latest."""
LONGEST_S = 365 * 86_400.0
"""gRPC takes a deadline beyond what its clock can hold for one that has passed."""
CLEANUP_S = 2.0
"""How long an abandoned turn's cancel may take, and how long ``close()`` waits for such calls."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often an operation is tried without progress, and how long is waited in between: a
    random time up to a ceiling that doubles, and what the server asks for on top. With several
    gateways the next one is tried at once. The defaults give up after about five seconds."""

    max_attempts: int = 10
    """Tries in a row without progress, the first one included; 1 never repeats."""
    initial_s: float = 0.05
    """Ceiling of the first wait, seconds."""
    max_s: float = 2.0
    """No ceiling is higher, seconds; it does not bound what the server asks for."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.initial_s < 0 or self.max_s < 0:
            raise ValueError("max_attempts is at least 1, times are not negative")

    def delay_s(self, failures: int, floor_s: float, rng: random.Random) -> float:
        """Before the next try, after ``failures`` (>= 1) in a row."""
        ceiling = min(self.max_s, self.initial_s * 2.0 ** (failures - 1))
        return floor_s + rng.uniform(0.0, ceiling)


@dataclass(frozen=True, slots=True)
class Runtime:
    """Time, randomness and ids; tests replace them."""

    now: Callable[[], float] = time.monotonic
    """Monotonic seconds."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway's services. Connects when first used."""

    target: str
    channel: aio.Channel
    sessions: session_pb2_grpc.SessionServiceAsyncStub
    fleet: fleet_pb2_grpc.FleetServiceAsyncStub


Method = Callable[[Gateway], aio.UnaryUnaryMultiCallable[Request, Response]]
StreamMethod = Callable[[Gateway], aio.UnaryStreamMultiCallable[Request, Response]]


def built(request: Callable[[], Request]) -> Request:
    """The request. A value that its fields cannot hold (too large, not of the type, no Unicode) is
    an InvalidRequest like one that the server refuses."""
    try:
        return request()
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise errors.InvalidRequest(
            f"the request holds a value that cannot be sent: {error}.",
            reason="INVALID_REQUEST",
            hint="Correct the arguments of the call.",
        ) from error


def _connect(target: str, credentials: grpc.ChannelCredentials | None) -> Gateway:
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Notices a gateway that hangs, or vanished without closing its connections. Any ping that
        # is under way already (gRPC measures bandwidth with some) delays the keep-alive's.
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    channel = (
        aio.insecure_channel(target, options=options)
        if credentials is None
        else aio.secure_channel(target, credentials, options=options)
    )
    return Gateway(
        target,
        channel,
        session_pb2_grpc.SessionServiceStub(channel),
        fleet_pb2_grpc.FleetServiceStub(channel),
    )


class Transport:
    """The gateways in the order given; ``gateway`` is the one in use."""

    def __init__(
        self,
        targets: Sequence[str],
        metadata: Sequence[tuple[str, str]],
        authorization: Callable[[], tuple[tuple[str, str], ...]],
        credentials: grpc.ChannelCredentials | None,
        retry: RetryPolicy,
        runtime: Runtime,
        timeout_s: float,
        tracing: Tracing | None = None,
        *,
        renews: bool = False,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """``renews``: ``authorization`` may give other credentials when it is asked again."""
        self._metadata = tuple(metadata)
        self._authorization = authorization
        self.tracing = tracing or Tracing()
        self.renews = renews
        self.retry = retry
        self.runtime = runtime
        self.timeout_s = timeout_s
        self.priority = priority
        """Of turns that name none."""
        self._gateways = [_connect(target, credentials) for target in targets]
        # Clients with the same list start at different gateways.
        self._current = runtime.rng.randrange(len(self._gateways))
        self._cleanups: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of a call that is made now: a token may be another one each time."""
        return (*self._metadata, *self._authorization())

    def with_options(self, timeout_s: float | None, retry: RetryPolicy | None) -> Transport:
        """The same connections under another time limit or policy (None: as here)."""
        view = copy.copy(self)
        view.timeout_s = self.timeout_s if timeout_s is None else timeout_s
        view.retry = retry or self.retry
        return view

    @property
    def gateway(self) -> Gateway:
        return self._gateways[self._current]

    @property
    def targets(self) -> int:
        return len(self._gateways)

    def leave(self, failed: Gateway) -> None:
        """Goes to the next gateway, unless another call already did."""
        if self.gateway is failed:
            self._current = (self._current + 1) % len(self._gateways)

    def warm_next(self) -> None:
        """Connects to the gateway that would be used next: a fail-over then saves the handshake."""
        spare = self._gateways[(self._current + 1) % len(self._gateways)]
        spare.channel.get_state(try_to_connect=True)

    def attempts(self, timeout_s: float, *, idempotent: bool = True) -> Attempts:
        """The tries of one operation that has ``timeout_s`` seconds from now."""
        return Attempts(self, self.runtime.now() + timeout_s, idempotent)

    async def call(
        self,
        method: Method[Request, Response],
        request: Callable[[], Request],
        *,
        timeout_s: float | None = None,
        idempotent: bool = True,
    ) -> Response:
        """One unary call within ``timeout_s`` (default: the client's), repeated as allowed."""
        message = built(request)
        metadata = (*self.metadata, *self.tracing.headers())
        attempts = self.attempts(
            self.timeout_s if timeout_s is None else timeout_s, idempotent=idempotent
        )
        while True:
            gateway = self.gateway
            try:
                return await method(gateway)(
                    message, timeout=attempts.time_left_s(), metadata=metadata
                )
            except aio.AioRpcError as error:
                await attempts.failed(errors.from_rpc(error), gateway)

    async def follow(
        self,
        method: StreamMethod[Request, Response],
        request: Callable[[float], Request],
        *,
        timeout_s: float = math.inf,
    ) -> AsyncGenerator[Response, None]:
        """A stream that may be opened again at any time, by a request for the seconds left, until
        the server ends it or ``timeout_s`` is over. Failures in a row without a message are bounded
        by the retry policy."""
        attempts = self.attempts(timeout_s)
        while True:
            gateway, left_s = self.gateway, attempts.time_left_s()
            limit_s = min(left_s, STREAM_S)
            message = built(partial(request, left_s))
            metadata = (*self.metadata, *self.tracing.headers())
            call = method(gateway)(message, timeout=limit_s, metadata=metadata)
            try:
                async for response in call:
                    attempts.progressed()
                    yield response
                return
            except aio.AioRpcError as rpc_error:
                error = errors.from_rpc(rpc_error)
                if not isinstance(error, errors.DeadlineExceeded) or limit_s < STREAM_S:
                    await attempts.failed(error, gateway)
            finally:
                call.cancel()

    async def clean_up(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a short last step even if the caller is being cancelled: the task belongs to this
        transport, and :meth:`close` waits for it. Errors are logged: nobody is left to tell."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._cleaned_up)
        await asyncio.wait([task])

    def _cleaned_up(self, task: asyncio.Task[None]) -> None:
        self._cleanups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("clean-up failed: %s", error)

    async def close(self) -> None:
        """Waits up to CLEANUP_S for last steps, then closes every connection. A cancelled caller
        does not stop it."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._cleanups:
            _, late = await asyncio.wait(self._cleanups, timeout=CLEANUP_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for gateway in self._gateways:
            await gateway.channel.close()


class Attempts:
    """Counts the failures in a row of one operation and waits between its tries."""

    def __init__(self, transport: Transport, deadline: float, idempotent: bool) -> None:
        self._transport = transport
        self._deadline = deadline
        self._idempotent = idempotent
        self._failures = 0

    def time_left_s(self) -> float:
        return min(max(self._deadline - self._transport.runtime.now(), 0.001), LONGEST_S)

    def progressed(self) -> None:
        """The operation got further: failures count from zero again."""
        self._failures = 0

    async def failed(
        self, error: errors.SessileError, gateway: Gateway, *, leave: bool = True
    ) -> None:
        """Returns when the operation may be tried again; otherwise raises ``error``. Leaves a
        gateway that is unavailable, unless it is not to blame."""
        transport = self._transport
        unavailable = leave and isinstance(error, errors.Unavailable)
        # A refusal for overload happens before any effect, so everything may be repeated after it.
        repeatable = error.retryable and (self._idempotent or not unavailable)
        repeatable |= transport.renews and error.reason == errors.CREDENTIALS_ENDED
        if unavailable:
            transport.leave(gateway)
        self._failures += 1
        if not repeatable or self._failures >= transport.retry.max_attempts:
            raise error
        floor_s = error.retry_after_s or 0.0
        untried = unavailable and self._failures < transport.targets
        delay_s = (
            floor_s
            if untried
            else transport.retry.delay_s(self._failures, floor_s, transport.runtime.rng)
        )
        if delay_s >= self.time_left_s():
            raise error
        log.debug("%s: %s; again in %.3f s", gateway.target, error.message, delay_s)
        if delay_s > 0:
            await transport.runtime.sleep(delay_s)
