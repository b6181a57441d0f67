"""From application calls to gRPC handlers: tenant, bounds and errors are dealt with once, here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from grpc import aio

from gateway.app.admission import Gate
from gateway.core.errors import DeadlineExceeded, InternalError, SessileError, Unavailable
from gateway.rpc.auth import Authenticator
from gateway.rpc.status import abort, parsed
from statestore.ports import StoreError, StoreUnavailable
from telemetry.metrics import GatewayMetrics
from telemetry.propagation import attach_caller

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]
Unary = Callable[[str, Any], Awaitable[Message]]
"""(tenant, request) -> response"""
Streaming = Callable[[str, Any], AsyncGenerator[Message, None]]
"""(tenant, request) -> responses"""
Relayed = Callable[[str, Any, float | None, Callable[[bytes], Awaitable[None]]], Awaitable[None]]
"""(tenant, request, seconds left of the caller's deadline, sink of serialised responses)"""


def store_failure(error: StoreError) -> SessileError:
    """What a caller is told when the store failed."""
    if isinstance(error, StoreUnavailable):
        return Unavailable("the store does not answer", retry_after_ms=500)
    return InternalError(f"{type(error).__name__}: {error}")


class Serving:
    """Makes handlers of application calls."""

    def __init__(
        self,
        authenticator: Authenticator,
        calls: Gate,
        watches: Gate,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._calls = calls
        self._watches = watches
        self._metrics = metrics or GatewayMetrics()

    def unary(self, call: Unary, request: type[Message]) -> Any:
        """One request, one response."""

        async def handler(data: bytes, context: Context) -> Message:
            try:
                tenant = await self._tenant(context)
                with self._calls.entered(tenant):
                    return await call(tenant, parsed(request, data))
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.unary_unary_rpc_method_handler(
            handler, None, lambda answer: answer.SerializeToString()
        )

    def streaming(self, call: Streaming, request: type[Message]) -> Any:
        """One request, a stream of responses; counted as a watch."""

        async def handler(data: bytes, context: Context) -> AsyncGenerator[Message, None]:
            try:
                tenant = await self._tenant(context)
                with self._watches.entered(tenant):
                    async with aclosing(call(tenant, parsed(request, data))) as answers:
                        async for answer in answers:
                            yield answer
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.unary_stream_rpc_method_handler(
            handler, None, lambda answer: answer.SerializeToString()
        )

    def relayed(self, call: Relayed, request: type[Message]) -> Any:
        """One request, a stream of responses that are serialised already."""

        async def handler(data: bytes, context: Context) -> None:
            try:
                tenant = await self._tenant(context)
                message = parsed(request, data)
                await call(tenant, message, context.time_remaining(), context.write)
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.unary_stream_rpc_method_handler(handler, None, None)

    async def _tenant(self, context: Context) -> str:
        """Who calls; from here on the call's task is in the caller's trace. Nothing is begun for a
        caller whose time is over."""
        attach_caller(context.invocation_metadata())
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the call's deadline passed before it was begun")
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        return await self._authenticator.tenant(metadata)

    async def _fail(self, context: Context, error: Exception) -> NoReturn:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, StoreError):
            error = store_failure(error)
        if isinstance(error, SessileError):
            self._metrics.call_failed(error.reason)
            await abort(context, error)
        if context.cancelled() or context.done():
            log.debug("a caller left: %s", error)
            raise error
        log.error("a call failed unexpectedly", exc_info=error)
        self._metrics.call_failed(InternalError.reason)
        await abort(context, InternalError(f"unexpected {type(error).__name__} in the gateway"))
