"""From application calls to gRPC handlers: caller, bounds and errors are dealt with once, here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from sessile.v1 import fleet_pb2, session_pb2

from gateway.app.admission import Gate
from gateway.core.errors import DeadlineExceeded, InternalError, SessileError, Unavailable
from gateway.rpc.auth import Authenticator
from gateway.rpc.open_streams import OpenStreams
from gateway.rpc.requests import Context, RequestReader
from gateway.rpc.status import abort, parsed
from gateway.security.access import Access, Caller, permit
from gateway.security.audit import Action, AuditLog
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.propagation import attach_caller
from statestore.ports import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

_RPC_OF: dict[str, str] = {
    method.input_type.full_name: method.full_name
    for file in (session_pb2, fleet_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

M = TypeVar("M", bound=Message)
REQUEST_S = 30.0
"""For a request to come after its call has begun."""

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


def rpc_of(request: type[Message]) -> str:
    """Full name of the RPC that takes these requests; no two take the same."""
    return _RPC_OF.get(request.DESCRIPTOR.full_name, "")


class Serving:
    """Makes handlers of application calls."""

    def __init__(
        self,
        authenticator: Authenticator,
        calls: Gate,
        watches: Gate,
        metrics: GatewayMetrics | None = None,
        audit: AuditLog | None = None,
        *,
        requests: Gate | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        """``requests`` bounds the calls whose request has not come yet and that count as nothing
        else until it has; it comes within ``request_s``."""
        self._authenticator = authenticator
        self._calls = calls
        self._watches = watches
        self._metrics = metrics or GatewayMetrics()
        self._audit = audit or AuditLog()
        self._streams = OpenStreams(authenticator)
        self._requests = requests or Gate("max_rpcs", 1 << 16, 500)
        self._reader = RequestReader(request_s)

    async def run(self) -> None:
        """Until cancelled: ends streams whose callers' credentials were revoked."""
        await self._streams.run()

    def unary(self, call: Unary, request: type[Message]) -> Any:
        """One request, one response."""

        async def handler(_: object, context: Context) -> Message:
            try:
                caller, access = await self._caller(_metadata(context), context, request)
                with self._calls.entered(caller.tenant):
                    message = await self._request(caller, context, request)
                    with self._recorded(caller, access, message, context):
                        return await call(caller.tenant, message)
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.stream_unary_rpc_method_handler(
            handler, None, lambda answer: answer.SerializeToString()
        )

    def streaming(self, call: Streaming, request: type[Message]) -> Any:
        """One request, a stream of responses; counted as a watch."""

        # Not as a generator, which gRPC leaves suspended when a call ends early: the stream and its
        # scopes end here, in the task that they began in.
        async def handler(_: object, context: Context) -> None:
            try:
                metadata = _metadata(context)
                caller, access = await self._caller(metadata, context, request)
                with self._watches.entered(caller.tenant):
                    with self._streams.entered(caller, metadata):
                        message = await self._request(caller, context, request)
                    with (
                        self._recorded(caller, access, message, context),
                        self._streams.entered(caller, metadata),
                    ):
                        async with aclosing(call(caller.tenant, message)) as answers:
                            async for answer in answers:
                                await context.write(answer.SerializeToString())
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.stream_stream_rpc_method_handler(handler, None, None)

    def relayed(self, call: Relayed, request: type[Message]) -> Any:
        """One request, a stream of responses that are serialised already."""

        async def handler(_: object, context: Context) -> None:
            try:
                metadata = _metadata(context)
                caller, access = await self._caller(metadata, context, request)
                with (
                    self._requests.entered(caller.tenant),
                    self._streams.entered(caller, metadata),
                ):
                    message = await self._request(caller, context, request)
                with (
                    self._recorded(caller, access, message, context),
                    self._streams.entered(caller, metadata),
                ):
                    await call(caller.tenant, message, context.time_remaining(), context.write)
            except Exception as error:  # noqa: BLE001 - every failure gets a status
                await self._fail(context, error)

        return grpc.stream_stream_rpc_method_handler(handler, None, None)

    async def _request(self, caller: Caller, context: Context, kind: type[M]) -> M:
        return parsed(kind, await self._reader.read(context, caller.tenant))

    async def _caller(
        self, metadata: Mapping[str, str], context: Context, request: type[Message]
    ) -> tuple[Caller, Access]:
        """Who calls, if it may; from here on the call's task is in the caller's trace. Nothing is
        begun for a caller whose time is over."""
        attach_caller(context.invocation_metadata())
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the call's deadline passed before it was begun")
        caller = await self._authenticator.caller(metadata)
        return caller, permit(caller, rpc_of(request))

    @contextmanager
    def _recorded(
        self, caller: Caller, access: Access, message: Message, context: Context
    ) -> Iterator[None]:
        """Writes an operator's action to the audit log, before and after it. Raises InternalError,
        with nothing done, if it cannot be written."""
        if not (access.audited or caller.foreign):
            yield
            return
        target = {
            name: getattr(message, name)
            for name in ("session_id", "replica_id", "target_replica_id")
            if getattr(message, name, "")
        }
        action = Action(rpc_of(type(message)), target, context.peer())
        try:
            self._audit.write(caller, action, "BEGUN")
        except OSError as error:
            log.error("the audit log cannot be written: %s", error)
            raise InternalError("the audit log cannot be written, so nothing was done") from error
        outcome = "CANCELLED"
        try:
            yield
            outcome = "OK"
        except SessileError as error:
            outcome = error.reason
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            try:
                self._audit.write(caller, action, outcome)
            except OSError as error:
                log.error("the audit log lacks how an action ended (%s): %s", outcome, error)

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


def _metadata(context: Context) -> Mapping[str, str]:
    """What the caller shows, as far as it is text."""
    shown = context.invocation_metadata() or ()
    return {key: value for key, value in shown if isinstance(value, str)}
