"""What turns need from their replica, in one place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from sessile.v1 import replica_pb2

from gateway.core.errors import (
    DataLoss,
    InvalidRequest,
    NotFound,
    NotOwner,
    SessileError,
    SessionClosed,
    SessionSuspended,
    TurnInProgress,
)
from gateway.telemetry.metrics import WorkerMetrics
from gateway.telemetry.tracing import Tracing
from statestore.ports import Fenced, JournalPort, LimitReached, Missing, Refused
from statestore.records import ReplicaRef, Session, SessionState, TurnContext
from workers.config import TurnLimits
from workers.engines.port import Engine
from workers.journal import Journal, until_answered
from workers.residency import Residency, ResidentSession
from workers.text.port import ChatMessage, LastTurn, TextCodec, Tool
from workers.turn.dispatcher import Dispatcher

MAX_SALTS = 4096
"""Tenant salts kept in memory; the least recently used goes first."""

MAX_RENDER_THREADS = 2
"""Long inputs rendered at once; others wait, and the store's and client's time limits apply."""


PullPrefix = Callable[[ResidentSession, replica_pb2.PrefixPlan], Awaitable[None]]
"""Makes missing KV pages resident from a peer as far as possible; never fails the turn."""


@dataclass(frozen=True, slots=True)
class TurnPorts:
    """The replica as its turns see it."""

    ref: ReplicaRef
    store: JournalPort
    journal: Journal
    engine: Engine
    codec: TextCodec
    dispatcher: Dispatcher
    residency: Residency
    salts: Salts
    pull_prefix: PullPrefix
    draw_seed: Callable[[], int]
    """A seed below 2^63 for turns whose client gave none."""
    limits: TurnLimits
    render_threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(MAX_RENDER_THREADS)
    )
    tracing: Tracing = field(default_factory=lambda: Tracing("sessile.worker"))
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    async def render(
        self, last_turn: LastTurn, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> list[int]:
        """What the codec renders; in a thread where that would hold up the event loop."""
        chars = sum(
            len(it.content) + sum(len(c.arguments) for c in it.tool_calls) for it in messages
        )
        chars += sum(len(tool.description) + len(tool.parameters) for tool in tools)
        if chars <= self.codec.quick_chars:
            return self.codec.render(last_turn, messages, tools)
        return await anyio.to_thread.run_sync(
            self.codec.render,
            last_turn,
            messages,
            tools,
            limiter=self.render_threads,
            abandon_on_cancel=True,
        )


@dataclass(slots=True)
class Salts:
    """Tenant salts, cached: they never change."""

    store: JournalPort
    _known: OrderedDict[str, bytes] = field(default_factory=OrderedDict)

    async def of(self, tenant: str, give_up_at: float) -> bytes:
        """Raises StoreUnavailable past ``give_up_at`` (the loop's clock)."""
        salt = self._known.get(tenant)
        if salt is None:
            salt = await until_answered(lambda: self.store.tenant_salt(tenant), give_up_at)
            self._known[tenant] = salt
            if len(self._known) > MAX_SALTS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(tenant)
        return salt


def refusal(session_id: str, outcome: Fenced | Refused | Missing | LimitReached) -> SessileError:
    """What a store's refusal means to whoever asked for the turn."""
    match outcome:
        case Fenced(data_loss=True):
            return DataLoss(
                f"session {session_id}: the store lost writes, and its history and this replica's"
                " cannot be joined"
            )
        case Fenced():
            return NotOwner(f"session {session_id} is owned under another epoch")
        case Missing():
            return NotFound(f"session {session_id} does not exist", reason="SESSION_NOT_FOUND")
        case LimitReached(what=what):
            return InvalidRequest(
                f"session {session_id}: {what}", hint="Go on in a new session or a fork."
            )
        case Refused(state=SessionState.CLOSED):
            return SessionClosed(f"session {session_id} is closed")
        case Refused(state=SessionState.SUSPENDED):
            return SessionSuspended(f"session {session_id} is suspended")
        case Refused(active_turn_id=str(other)):
            return TurnInProgress(
                f"turn {other} of session {session_id} is running", metadata={"turn_id": other}
            )
        case Refused():
            # Open and idle: it is this replica that may not, its tokenizer is not the session's.
            return NotOwner(f"session {session_id} is not one for this replica")


async def read_session(
    store: JournalPort, session_id: str, tenant: str | None, give_up_at: float
) -> Session:
    """The session of this tenant (None: of any); raises NotFound, also for another tenant's, and
    StoreUnavailable past ``give_up_at`` (the loop's clock)."""
    session = await until_answered(lambda: store.get_session(session_id), give_up_at)
    if session is None or (tenant is not None and session.tenant != tenant):
        raise refusal(session_id, Missing())
    return session


async def read_context(
    ports: TurnPorts, session_id: str, turn_id: str, give_up_at: float
) -> TurnContext:
    """The session, the turn if it exists, and what of the ledger is not resident here: everything
    an opening needs, in one round trip. Raises NotFound, and StoreUnavailable past ``give_up_at``
    (the loop's clock)."""
    resident = ports.residency.get(session_id)
    have = len(resident.tokens) if resident is not None else 0
    context = await until_answered(
        lambda: ports.store.get_turn_context(session_id, turn_id, have), give_up_at
    )
    if context is None:
        raise refusal(session_id, Missing())
    return context
