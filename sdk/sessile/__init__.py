"""Client of Sessile: durable agent sessions with an exactly-once token stream.

    import asyncio
    from sessile import Sessile, Tokens

    async def main() -> None:
        async with Sessile("localhost:8470") as client:
            session = await client.open(system="You are brief.")
            async for event in session.run("What is 6 * 7?", max_tokens=32):
                if isinstance(event, Tokens):
                    print(event.text, end="", flush=True)

    asyncio.run(main())

``sessile.sync`` has the same for code without an event loop, ``sessile.v1`` the generated stubs.
"""

from sessile.client import Sessile
from sessile.errors import (
    AccessDenied,
    ContextTooLong,
    DataLoss,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MigrationFailed,
    MigrationRefused,
    NotFound,
    Overloaded,
    ProtocolError,
    SessileError,
    SessionClosed,
    SessionSuspended,
    StaleClient,
    TurnCancelled,
    TurnConflict,
    TurnFailed,
    TurnInProgress,
    Unavailable,
    WrongState,
)
from sessile.events import (
    Accepted,
    Finished,
    Moved,
    MoveReason,
    Tokens,
    TurnEvent,
    Waiting,
    WaitReason,
)
from sessile.fleet import DrainProgress, Fleet, Migration, Replica, ReplicaLoad, ReplicaState
from sessile.messages import Message, Role, Sampling, Tool, ToolCall
from sessile.records import (
    FinishReason,
    Position,
    ReplicaRef,
    SessionInfo,
    SessionState,
    TranscriptTurn,
    TurnResult,
    TurnStatus,
    Usage,
)
from sessile.session import Session
from sessile.transport import RetryPolicy, Runtime
from sessile.turn import OnAbandon, Turn

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "AccessDenied",
    "ContextTooLong",
    "DataLoss",
    "DeadlineExceeded",
    "DrainProgress",
    "FinishReason",
    "Finished",
    "Fleet",
    "InternalError",
    "InvalidRequest",
    "Message",
    "Migration",
    "MigrationFailed",
    "MigrationRefused",
    "MoveReason",
    "Moved",
    "NotFound",
    "OnAbandon",
    "Overloaded",
    "Position",
    "ProtocolError",
    "Replica",
    "ReplicaLoad",
    "ReplicaRef",
    "ReplicaState",
    "RetryPolicy",
    "Role",
    "Runtime",
    "Sampling",
    "Sessile",
    "SessileError",
    "Session",
    "SessionClosed",
    "SessionInfo",
    "SessionState",
    "SessionSuspended",
    "StaleClient",
    "Tokens",
    "Tool",
    "ToolCall",
    "TranscriptTurn",
    "Turn",
    "TurnCancelled",
    "TurnConflict",
    "TurnEvent",
    "TurnFailed",
    "TurnInProgress",
    "TurnResult",
    "TurnStatus",
    "Unavailable",
    "Usage",
    "WaitReason",
    "Waiting",
    "WrongState",
]
