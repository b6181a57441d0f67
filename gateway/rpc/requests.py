"""The one request of a call, read within a time limit.

gRPC counts a call from its headers on, and takes the request of a unary call in before anybody is
asked. A peer that sends headers and nothing else would so hold one of all places for as long as it
likes. Handlers therefore read for themselves, after they know who calls; on the wire nothing
differs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import anyio
import grpc
from grpc import aio

from gateway.app.admission import Gate
from gateway.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, SessileError
from gateway.rpc.status import abort

Context = aio.ServicerContext[Any, Any]


MAX_AT_ONCE = 32
"""Requests of one caller that are taken in at once."""
RETRY_MS = 500


@dataclass(slots=True)
class _Turn:
    """Whose turn it is among one caller's calls."""

    places: anyio.Semaphore
    calls: int = 0


class RequestReader:
    """Takes requests in, of one caller so many at once. Others wait unread, where flow control
    holds back all but their beginning: half of a large request in each of many calls would
    otherwise be a lot to hold. The table is as large as there are callers with calls to read."""

    def __init__(self, within_s: float, at_once: int = MAX_AT_ONCE) -> None:
        self._within_s = within_s
        self._at_once = at_once
        self._turns: dict[str, _Turn] = {}

    @property
    def callers(self) -> int:
        """Of whom a call is not read yet."""
        return len(self._turns)

    async def read(self, context: Context, caller: str) -> Any:
        """What the handler's deserialiser made of the request, bytes without one. Raises
        InvalidRequest if the caller sends none, DeadlineExceeded if it does not come in time, and
        Overloaded if for as long the caller's others were before it."""
        turn = self._turns.get(caller)
        if turn is None:
            places = anyio.Semaphore(self._at_once, fast_acquire=True)
            turn = self._turns[caller] = _Turn(places)
        turn.calls += 1
        try:
            with anyio.move_on_after(self._within_s) as waiting:
                await turn.places.acquire()
            if waiting.cancelled_caught:
                raise Overloaded(
                    f"{self._at_once} other requests of this caller are still coming in",
                    retry_after_ms=RETRY_MS,
                    metadata={"bound": "requests_at_once", "limit": str(self._at_once)},
                )
            try:
                return await self._come(context)
            finally:
                turn.places.release()
        finally:
            turn.calls -= 1
            if not turn.calls:
                del self._turns[caller]

    async def _come(self, context: Context) -> Any:
        with anyio.move_on_after(self._within_s):
            request = await context.read()
            if request is aio.EOF:
                raise InvalidRequest(
                    "the call carries no request", hint="Send one message with it."
                )
            return request
        raise DeadlineExceeded(
            f"the request did not come within {self._within_s:g} s of the call",
            hint="Send the request with the call; over a slow network, a smaller one.",
        )


class OpenServices:
    """In the place of a server, for services that anybody may call (health, reflection): bounds
    how many of their calls are open at once, for each peer's address too."""

    def __init__(self, server: aio.Server, calls: Gate, request_s: float) -> None:
        self._server = server
        self._calls = calls
        self._reader = RequestReader(request_s)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(
            tuple(_Bounded(handler, self._calls, self._reader) for handler in handlers)
        )

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Nothing: they would go past the bound. Generic handlers serve the same methods."""


class _Bounded(grpc.GenericRpcHandler):
    def __init__(self, inner: grpc.GenericRpcHandler, calls: Gate, reader: RequestReader) -> None:
        self._inner = inner
        self._calls = calls
        self._reader = reader

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        found = cast(Any, self._inner.service(call))
        if found is None:
            return None
        given = (found.request_deserializer, found.response_serializer)
        if found.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(found.stream_stream), *given
            )
        if found.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._unary(found.unary_stream), *given)
        return grpc.stream_unary_rpc_method_handler(self._unary(found.unary_unary), *given)

    def _unary(self, inner: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def handler(_: object, context: Context) -> Any:
            try:
                host = _host(context)
                with self._calls.entered(host):
                    return await inner(await self._reader.read(context, host), context)
            except SessileError as error:
                await abort(context, error)

        return handler

    def _streaming(self, inner: Callable[[Any, Context], Any]) -> Any:
        """``inner`` gives its answers as an asynchronous generator."""

        async def handler(requests: Any, context: Context) -> Any:
            try:
                with self._calls.entered(_host(context)):
                    async with aclosing(inner(requests, context)) as answers:
                        async for answer in answers:
                            await context.write(answer)
            except Overloaded as error:
                await abort(context, error)

        return handler


def _host(context: Context) -> str:
    """The peer's address without its port; calls over a socket of this machine are one peer's."""
    return context.peer().rpartition(":")[0]
