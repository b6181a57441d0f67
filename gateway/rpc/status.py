"""Errors on the wire: one table from the error tree to gRPC status, and its inverse.

A failed call carries ``google.rpc.Status`` details: ``ErrorInfo`` (domain ``sessile``, the error's
reason and metadata), ``LocalizedMessage`` (the hint), where waiting helps ``RetryInfo``, and for a
tenant's quota ``QuotaFailure``. Both hops use it, client to gateway and gateway to replica, so an
error raised on a replica reaches the agent unchanged.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from gateway.core import errors
from gateway.core.errors import SessileError

Request = TypeVar("Request", bound=Message)

DOMAIN = "sessile"
DETAILS_KEY = "grpc-status-details-bin"
LOCALE = "en"
MAX_TEXT_BYTES = 768
"""Message and hint are cut to this, in UTF-8. Trailers must stay under the 8 KiB that gRPC always
takes, where a message costs up to three times its bytes and details a third more than theirs."""
MAX_METADATA_ENTRIES = 8
MAX_METADATA_BYTES = 128
"""Of a key, and of a value."""

CODES: dict[type[SessileError], grpc.StatusCode] = {
    SessileError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MessageTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SessionClosed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SessionSuspended: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TurnInProgress: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StaleClient: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MigrationRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TurnConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.RequestConflict: grpc.StatusCode.ALREADY_EXISTS,
    # Not CANCELLED: client libraries take that for a cancel of the call itself.
    errors.TurnCancelled: grpc.StatusCode.ABORTED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.NotOwner: grpc.StatusCode.ABORTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.MigrationFailed: grpc.StatusCode.ABORTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
"""Every class of the tree; a subclass made elsewhere is mapped as its nearest listed ancestor."""

_BY_REASON: dict[str, type[SessileError]] = {
    cls.reason: cls for cls in CODES if cls is not SessileError
}

_BY_CODE: dict[grpc.StatusCode, type[SessileError]] = {
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: errors.WrongState,
    grpc.StatusCode.ALREADY_EXISTS: errors.TurnConflict,
    grpc.StatusCode.ABORTED: errors.Unavailable,
    grpc.StatusCode.DATA_LOSS: errors.DataLoss,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
}
"""For errors without our details (made by the transport), or whose reason word is not a class's own
(``SESSION_NOT_FOUND``). Codes not listed are ``InternalError``."""


def code_of(error: SessileError) -> grpc.StatusCode:
    """The gRPC code of an error, by its nearest listed class."""
    for cls in type(error).__mro__:
        if cls in CODES:
            return CODES[cls]
    raise AssertionError("SessileError itself is listed")


def to_status(error: SessileError) -> status_pb2.Status:
    """The error as ``google.rpc.Status`` with all its details. Long texts are cut."""
    status = status_pb2.Status(code=code_of(error).value[0], message=_cut(error.message))
    metadata = sorted(error.metadata.items())[:MAX_METADATA_ENTRIES]
    _add(
        status,
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={
                _cut(key, MAX_METADATA_BYTES): _cut(value, MAX_METADATA_BYTES)
                for key, value in metadata
            },
        ),
    )
    _add(status, error_details_pb2.LocalizedMessage(locale=LOCALE, message=_cut(error.hint)))
    quota = error.metadata.get("quota")
    if quota is not None:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=f"quota:{_cut(quota, MAX_METADATA_BYTES)}",
            description=_cut(error.message, MAX_METADATA_BYTES),
        )
        _add(status, error_details_pb2.QuotaFailure(violations=[violation]))
    if error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


async def abort(context: aio.ServicerContext[Any, Any], error: SessileError) -> NoReturn:
    """Ends the call with the error's status and details. Raises, as ``context.abort`` does."""
    status = to_status(error)
    await context.abort(
        code_of(error), status.message, ((DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort raises")  # pragma: no cover


def has_details(error: aio.AioRpcError) -> bool:
    """The peer's application sent this error; otherwise the transport made it up."""
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def parsed(kind: type[Request], data: bytes) -> Request:
    """The request. Not left to gRPC, which would answer UNKNOWN and log the caller's mistake as
    ours. Raises InvalidRequest."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise errors.InvalidRequest(
            f"the request is no {kind.DESCRIPTOR.name}: its bytes are malformed, or a text in it "
            "is not UTF-8",
            hint="Serialise it with stubs of proto/sessile/v1; send text that is valid UTF-8.",
        ) from error


def error_from_rpc(error: aio.AioRpcError) -> SessileError:
    """Inverse of :func:`abort`; also for errors made by the transport, which have no details."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:  # details that contradict the status: trust the status alone
        status = None
    message = error.details() or error.code().name
    fallback = _BY_CODE.get(error.code(), errors.InternalError)
    if status is None:
        return fallback(message)
    info, localized, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.LocalizedMessage(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for target in (info, localized, retry):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
    if info.domain != DOMAIN:
        return fallback(message)
    cls = _BY_REASON.get(info.reason, fallback)
    return cls(
        message,
        hint=localized.message,
        reason=info.reason,
        retry_after_ms=(
            retry.retry_delay.ToMilliseconds() if retry.HasField("retry_delay") else None
        ),
        metadata=dict(info.metadata),
    )


def _add(status: status_pb2.Status, detail: Any) -> None:
    status.details.add().Pack(detail)


def _cut(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - len("…".encode())].decode(errors="ignore") + "…"
