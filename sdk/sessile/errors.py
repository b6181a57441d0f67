"""What a call can end with: one tree, mapped from the gateway's status details.

    SessileError
    ├── InvalidRequest          the request itself is wrong
    │   ├── ContextTooLong      the turn's input does not fit the model's context
    │   ├── MessageTooLarge     more bytes than the tenant may send in one request
    │   └── OutOfRange          it asks for what is past the session's end
    ├── NotFound                no such session, turn, replica or model for this tenant
    ├── AccessDenied            the caller may not do this
    │   ├── Unauthenticated     credentials are missing or not accepted
    │   └── PermissionDenied    the credentials are for something else
    ├── WrongState              the session cannot do this now
    │   ├── SessionClosed
    │   ├── SessionSuspended
    │   ├── TurnInProgress      another turn of the session runs
    │   ├── StaleClient         the session moved on since this client last saw it
    │   └── MigrationRefused    the target cannot take the session
    ├── TurnConflict            the turn id was used before with other input
    ├── RequestConflict         the request id was used before with other content
    ├── TurnCancelled           the turn id was cancelled before the turn began
    ├── TurnFailed              the turn was accepted and ended FAILED; ``result`` has what there is
    ├── DataLoss                this client holds more than the ledger does
    ├── Overloaded              a bound is reached; retried after ``retry_after_s``
    │   └── QuotaExceeded       one of the tenant's own
    ├── Unavailable             nobody answers; retried
    ├── DeadlineExceeded        the time given has passed
    ├── MigrationFailed         the move broke; the session is where it was
    ├── ToolFailed              a tool raised, and the run was told to raise too
    ├── ToolRoundsExceeded      the model still asks for tools after the last round
    ├── ProtocolError           the stream broke its own rules (a gap, a repeat)
    └── InternalError           a bug in the server

``retryable`` errors reach the caller only after the retries of :class:`sessile.RetryPolicy` are
used up or the time is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import grpc
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

if TYPE_CHECKING:
    from sessile.records import TurnResult
    from sessile.tool_run import ToolRunResult

DOMAIN = "sessile"


class SessileError(Exception):
    """Base. ``reason`` is a stable upper-case word, ``hint`` says what to do next,
    ``retry_after_s`` is set where waiting helps, ``metadata`` has machine-readable details."""

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        hint: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.metadata: Mapping[str, str] = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InvalidRequest(SessileError):
    """The request is wrong; a repeat as it is fails again."""


class ContextTooLong(InvalidRequest):
    """The input does not fit the model's context."""


class MessageTooLarge(InvalidRequest):
    """More bytes than the tenant may send in one request."""


class OutOfRange(InvalidRequest):
    """It asks for what is past the session's end, such as a fork after turns that never were."""


class NotFound(SessileError):
    """No such thing for this tenant."""


class AccessDenied(SessileError):
    """The caller may not do this."""


class Unauthenticated(AccessDenied):
    """Credentials are missing or not accepted (by the gateway, or by a proxy before it)."""


class PermissionDenied(AccessDenied):
    """The credentials are for something else: another role, another tenant."""


class WrongState(SessileError):
    """The session cannot do this now."""


class SessionClosed(WrongState):
    """The session has ended."""


class SessionSuspended(WrongState):
    """Call ``resume()`` first."""


class TurnInProgress(WrongState):
    """Another turn of the session runs."""


class StaleClient(WrongState):
    """The session moved on since this handle last saw it: ``refresh()`` or read the transcript."""


class MigrationRefused(WrongState):
    """The target cannot take the session."""


class TurnConflict(SessileError):
    """The turn id was used before with other input."""


class RequestConflict(SessileError):
    """The request id was used before to open or fork a session with other content."""


class TurnCancelled(SessileError):
    """The turn id was cancelled before the turn began."""


class TurnFailed(SessileError):
    """The turn was accepted and ended FAILED. What it delivered stays in the ledger."""

    def __init__(self, message: str, result: TurnResult) -> None:
        super().__init__(message, reason="TURN_FAILED")
        self.result = result


class DataLoss(SessileError):
    """This client holds more than the ledger does, or another history."""


class Overloaded(SessileError):
    """A bound of the server is reached; nothing was begun."""

    retryable = True


class QuotaExceeded(Overloaded):
    """A quota of the tenant is used up. ``metadata`` has ``quota``, ``limit`` and ``used``."""


class Unavailable(SessileError):
    """Nobody answers, or the connection broke."""

    retryable = True


class DeadlineExceeded(SessileError):
    """The time given has passed; a turn can be attached to again by its id."""


class MigrationFailed(SessileError):
    """The move broke; the session is where it was."""


class ToolFailed(SessileError):
    """A tool could not be called or raised (``__cause__``), and ``on_tool_error`` is ``"raise"``.
    The session is as it was before the call; the same ``run_id`` goes on there."""


class ToolRoundsExceeded(SessileError):
    """The model asked for tools in every round; ``result`` has what there is. The last calls were
    not made."""

    def __init__(self, message: str, result: ToolRunResult) -> None:
        super().__init__(
            message,
            reason="TOOL_ROUNDS_EXCEEDED",
            hint="Allow more rounds by max_rounds, with the same run_id to go on from here.",
        )
        self.result = result


class ProtocolError(SessileError):
    """The stream broke its own rules."""


class InternalError(SessileError):
    """A bug in the server."""


CREDENTIALS_ENDED = "CREDENTIALS_ENDED"
"""Those of an open stream expired or were revoked: with a new token it can be opened again."""

BY_REASON: Mapping[str, type[SessileError]] = {
    "INVALID_REQUEST": InvalidRequest,
    "CONTEXT_TOO_LONG": ContextTooLong,
    "MESSAGE_TOO_LARGE": MessageTooLarge,
    "OUT_OF_RANGE": OutOfRange,
    "NOT_FOUND": NotFound,
    "SESSION_NOT_FOUND": NotFound,
    "TURN_NOT_FOUND": NotFound,
    "REPLICA_NOT_FOUND": NotFound,
    "MODEL_NOT_FOUND": NotFound,
    "UNAUTHENTICATED": Unauthenticated,
    CREDENTIALS_ENDED: Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "WRONG_STATE": WrongState,
    "SESSION_CLOSED": SessionClosed,
    "SESSION_SUSPENDED": SessionSuspended,
    "TURN_IN_PROGRESS": TurnInProgress,
    "STALE_CLIENT": StaleClient,
    "MIGRATION_REFUSED": MigrationRefused,
    "TURN_ID_REUSED": TurnConflict,
    "REQUEST_ID_REUSED": RequestConflict,
    "TURN_CANCELLED": TurnCancelled,
    "DATA_LOSS": DataLoss,
    # Between gateway and replica; a client that meets them just asks again.
    "NOT_OWNER": Unavailable,
    "REPLICA_LOST": Unavailable,
    "OVERLOADED": Overloaded,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "MIGRATION_FAILED": MigrationFailed,
    "INTERNAL": InternalError,
}
"""Every reason word of the server. Words of a newer server fall back to the gRPC code."""

BY_CODE: Mapping[grpc.StatusCode, type[SessileError]] = {
    # The call was not cancelled here (that is CancelledError): the server went away under it.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: WrongState,
    grpc.StatusCode.ALREADY_EXISTS: TurnConflict,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}
"""For errors without our details (made by the transport or a proxy); others: InternalError."""


TOO_LARGE = "Send less in one call: a gateway takes 5 MB unless it is configured otherwise."
"""gRPC itself refuses a message over the bound, on either side, whenever it is repeated."""


def from_rpc(error: aio.AioRpcError) -> SessileError:
    """The error of a failed call, with the details that it carries."""
    code, message = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequest(message + ".", reason="INVALID_REQUEST", hint=TOO_LARGE)
    fallback = BY_CODE.get(code, InternalError)
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message:
        fallback = Unavailable  # the transport's word for a stream that was cut
    info = error_details_pb2.ErrorInfo()
    localized = error_details_pb2.LocalizedMessage()
    retry = error_details_pb2.RetryInfo()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:  # details that contradict the status: trust the status alone
        status = None
    for detail in status.details if status is not None else ():
        for target in (info, localized, retry):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
    ours = info.domain == DOMAIN
    cls = BY_REASON.get(info.reason, fallback) if ours else fallback
    return cls(
        message,
        reason=info.reason if ours else code.name,
        hint=localized.message,
        retry_after_s=(
            retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
        ),
        metadata=dict(info.metadata),
    )
