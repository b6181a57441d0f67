"""What can go wrong for a caller: one tree, one reason word each, always with what to do next.

    SessileError
    ├── InvalidRequest          the request itself is wrong
    │   ├── ContextTooLong      the turn's input does not fit the model's context
    │   ├── MessageTooLarge     more bytes than the tenant may send in one request
    │   └── OutOfRange          it asks for what is past the session's end
    ├── NotFound                SESSION_, TURN_, REPLICA_, MODEL_NOT_FOUND
    ├── Unauthenticated         credentials are missing or not accepted; CREDENTIALS_ENDED
    ├── PermissionDenied        the caller's role may not do this
    ├── WrongState              the session cannot do this now
    │   ├── SessionClosed
    │   ├── SessionSuspended
    │   ├── TurnInProgress      another turn of the session runs
    │   ├── StaleClient         the caller's precondition is behind the ledger
    │   └── MigrationRefused    the target cannot take the session
    ├── TurnConflict            the turn id was used with other input
    ├── RequestConflict         the request id was used with other content
    ├── TurnCancelled           the turn was cancelled before it began
    ├── DataLoss                the caller holds more than the ledger does
    ├── NotOwner                between gateway and replica: ask the store again
    ├── Overloaded              a bound is reached; try again after ``retry_after_ms``
    │   └── QuotaExceeded       one of the tenant's own
    ├── Unavailable             no replica, store or peer answers; try again
    ├── DeadlineExceeded        the call's own deadline passed
    ├── MigrationFailed         the move broke; the owner is as it was
    └── InternalError           a bug; the message says what was found

``gateway/rpc/status.py`` maps each class to a gRPC status, and a test checks that none is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class SessileError(Exception):
    """Base. ``hint`` says what the caller can do; ``retry_after_ms`` is set where waiting helps;
    ``metadata`` carries machine-readable details (never secrets or other tenants' data)."""

    reason: str = "INTERNAL"
    default_hint: ClassVar[str] = "Report this with the request's trace id."

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        reason: str = "",
        retry_after_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint
        if reason:
            self.reason = reason
        self.retry_after_ms = retry_after_ms
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequest(SessileError):
    """The request itself is wrong."""

    reason = "INVALID_REQUEST"
    default_hint = "Correct the request; a repeat as it is fails again."


class ContextTooLong(InvalidRequest):
    """The turn's input does not fit the model's context."""

    reason = "CONTEXT_TOO_LONG"
    default_hint = "Send less input, or open or fork a session with a shorter history."


class MessageTooLarge(InvalidRequest):
    """More bytes than the tenant may send in one request: a repeat would not help."""

    reason = "MESSAGE_TOO_LARGE"
    default_hint = "Send less in one call: the turn's new messages only, and long ones in pieces."


class OutOfRange(InvalidRequest):
    """It asks for what is past the session's end; as the session grows, it may come to be right."""

    reason = "OUT_OF_RANGE"
    default_hint = "Read the session and ask for what it has."


class NotFound(SessileError):
    """No such session, turn, replica or model (for this tenant)."""

    reason = "NOT_FOUND"
    default_hint = "Check the id and that it belongs to your tenant."


class Unauthenticated(SessileError):
    """Credentials are missing or not accepted."""

    reason = "UNAUTHENTICATED"
    default_hint = (
        "Send a valid API key or token. A key that was revoked or has expired is replaced with"
        " `sessile keys create`."
    )


class PermissionDenied(SessileError):
    """The caller's role may not do this."""

    reason = "PERMISSION_DENIED"
    default_hint = "Use credentials of the role operator, or leave this to an operator."


class WrongState(SessileError):
    """The session cannot do this now."""

    reason = "WRONG_STATE"
    default_hint = "Read the session and act on its state."


class SessionClosed(WrongState):
    """The session has ended."""

    reason = "SESSION_CLOSED"
    default_hint = "Open a new session."


class SessionSuspended(WrongState):
    """The session holds nothing on any replica until it is resumed."""

    reason = "SESSION_SUSPENDED"
    default_hint = "Call ResumeSession first."


class TurnInProgress(WrongState):
    """Another turn of the session runs."""

    reason = "TURN_IN_PROGRESS"
    default_hint = "Attach to the running turn by its id, wait for it, or cancel it."


class StaleClient(WrongState):
    """The caller's precondition is behind the ledger."""

    reason = "STALE_CLIENT"
    default_hint = "Read the transcript: the session has moved on since you last saw it."


class MigrationRefused(WrongState):
    """The target cannot take the session."""

    reason = "MIGRATION_REFUSED"
    default_hint = "Choose a READY replica of the same model, or wait for the move under way."


class TurnConflict(SessileError):
    """The turn id was used with other input."""

    reason = "TURN_ID_REUSED"
    default_hint = "Use a new turn id for new input."


class RequestConflict(SessileError):
    """The request id was used to open or fork a session with other content."""

    reason = "REQUEST_ID_REUSED"
    default_hint = "Use a new request id for a new session."


class TurnCancelled(SessileError):
    """The turn was cancelled before it began."""

    reason = "TURN_CANCELLED"
    default_hint = "The turn id was cancelled before it began; use a new one."


class DataLoss(SessileError):
    """The caller holds more than the ledger does."""

    reason = "DATA_LOSS"
    default_hint = (
        "The store lost acknowledged writes and no replica can restore them. "
        "Fork from the last turn that the transcript shows."
    )


class NotOwner(SessileError):
    """The replica does not own the session under that epoch."""

    reason = "NOT_OWNER"
    default_hint = "Read the session's owner again and call that replica."


class Overloaded(SessileError):
    """A bound is reached."""

    reason = "OVERLOADED"
    default_hint = "Try again after the retry delay."


class QuotaExceeded(Overloaded):
    """A quota of the tenant is used up. ``metadata`` has ``quota``, ``limit`` and ``used``."""

    reason = "QUOTA_EXCEEDED"


class Unavailable(SessileError):
    """No replica, store or peer answers."""

    reason = "UNAVAILABLE"
    default_hint = "Try again; the session is safe in its ledger."


class DeadlineExceeded(SessileError):
    """The call's own deadline passed."""

    reason = "DEADLINE_EXCEEDED"
    default_hint = "Call again with the same turn id to go on, or allow more time."


class MigrationFailed(SessileError):
    """The move broke; the owner is as it was."""

    reason = "MIGRATION_FAILED"
    default_hint = "The session is still where it was and can run; try again."


class InternalError(SessileError):
    """A bug in the server."""

    reason = "INTERNAL"
