"""Services without sockets: the handlers that a server would call; bytes in, a status out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import anyio
import grpc
from google.rpc import error_details_pb2, status_pb2

from gateway.rpc.status import CODES, DETAILS_KEY, DOMAIN

EXPECTED = frozenset(CODES.values()) - {grpc.StatusCode.INTERNAL}
"""What a caller may be told for what it sent. INTERNAL is a bug of the server's."""


class Aborted(Exception):
    """What ``context.abort`` raises."""


@dataclass
class Answer:
    """How one call ended."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""
    reason: str = ""
    hint: str = ""
    retry_ms: int | None = None
    responses: list[Any] = field(default_factory=list)
    trailing: list[bytes] = field(default_factory=list)
    """Values of the trailing metadata."""
    left: bool = False
    """The caller hung up: the call had not ended in its time."""
    unexpected: BaseException | None = None

    def check(self) -> None:
        """The call ended as the API says: with responses, or one of its errors with its details."""
        assert self.unexpected is None, repr(self.unexpected)
        if self.code is grpc.StatusCode.OK:
            return
        assert self.code in EXPECTED, f"{self.code}: {self.message}"
        assert self.reason, "an error without its reason"
        assert self.hint, "an error that does not say what to do"
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            assert self.retry_ms is not None


@dataclass
class Context:
    """A ``grpc.aio.ServicerContext`` as far as the handlers use one."""

    answer: Answer
    metadata: Sequence[tuple[str, str]]
    time_s: float
    request: bytes = b""
    sent: anyio.Event | None = None
    """The request comes when this is set; None: with the call."""

    async def read(self) -> bytes:
        if self.sent is not None:
            await self.sent.wait()
        return self.request

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float:
        return self.time_s

    def cancelled(self) -> bool:
        return False

    def done(self) -> bool:
        return False

    async def write(self, message: bytes) -> None:
        self.answer.responses.append(message)

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, bytes]] = ()
    ) -> NoReturn:
        self.answer.code, self.answer.message = code, details
        self.answer.trailing = [value for _, value in trailing]
        status = status_pb2.Status.FromString(dict(trailing).get(DETAILS_KEY, b""))
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            advice = error_details_pb2.LocalizedMessage()
            if detail.Unpack(info) and info.domain == DOMAIN:
                self.answer.reason = info.reason
            if detail.Unpack(advice):
                self.answer.hint = advice.message
            if detail.Unpack(retry):
                self.answer.retry_ms = retry.retry_delay.ToMilliseconds()
        raise Aborted


class Wire:
    """Takes the place of ``grpc.aio.Server``, for whoever adds services to one."""

    def __init__(self) -> None:
        self._handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers.extend(handlers)

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        metadata: Sequence[tuple[str, str]] = (),
        time_s: float = 30.0,
        patience_s: float = 120.0,
        sent: anyio.Event | None = None,
    ) -> Answer:
        """``time_s`` is the caller's deadline as it tells the server; it hangs up after
        ``patience_s``."""
        details = _Details(method, tuple(metadata))
        handler: Any = next(filter(None, (h.service(details) for h in self._handlers)))
        answer = Answer()
        assert handler.request_deserializer is None
        context = Context(answer, metadata, time_s, request, sent)
        with anyio.move_on_after(patience_s) as scope:
            try:
                await self._run(handler, request, context)
            except Aborted:
                pass
            except Exception as error:  # noqa: BLE001 - a server would answer UNKNOWN
                answer.unexpected = error
        answer.left = scope.cancelled_caught
        return answer

    async def _run(self, handler: Any, message: bytes, context: Context) -> None:
        # Those that read for themselves are given no request.
        if (unary := handler.unary_unary or handler.stream_unary) is not None:
            response = await unary(message, context)
            context.answer.responses.append(handler.response_serializer(response))
            return
        result = (handler.unary_stream or handler.stream_stream)(message, context)
        if inspect.isasyncgen(result):
            try:
                async for response in result:
                    await context.write(handler.response_serializer(response))
            finally:
                with anyio.CancelScope(shield=True):
                    await result.aclose()
        else:
            await result


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]
