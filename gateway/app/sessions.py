"""Opening, reading, forking, suspending and closing sessions.

Every call checks the tenant through the directory. What the store decides is final; telling
replicas afterwards only frees what they hold sooner.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

from sessile.v1 import replica_pb2, session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.assignment import not_open
from gateway.app.convert import SESSION_STATES, TURN_STATUSES, epoch_to_pb, session_to_pb
from gateway.app.directory import unknown_session
from gateway.app.request_checks import check_leading, check_params, check_roles, check_tools
from gateway.app.services import Services
from gateway.core.errors import (
    InvalidRequest,
    NotFound,
    OutOfRange,
    RequestConflict,
    SessileError,
    SessionClosed,
    TurnInProgress,
    Unavailable,
    WrongState,
)
from gateway.telemetry import attributes as a
from statestore.digest import RollingDigest
from statestore.ports import (
    HeadMismatch,
    LimitReached,
    Missing,
    Refused,
    SessionWritten,
    TurnEnded,
    TurnUnknown,
)
from statestore.records import NewSession, Owner, ReplicaRef, Session, SessionState

log = logging.getLogger(__name__)

MAX_RETENTION_MS = 30 * 24 * 3_600_000
DEFAULT_PAGE = 100
MAX_PAGE = 1000
_OPEN_STATES = frozenset({SessionState.OPEN, SessionState.SUSPENDED})


class Sessions:
    """The agent API beside turns."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._store = services.store
        self._directory = services.directory
        self._fleet = services.fleet
        self._assigner = services.assigner
        self._replicas = services.replicas
        self._config = services.config
        self._quotas = services.quotas

    async def open(
        self, tenant: str, request: session_pb2.OpenSessionRequest
    ) -> session_pb2.OpenSessionResponse:
        """Idempotent by request id; the same id with other content is RequestConflict."""
        self._check_request_id(request.request_id)
        self._quotas.check_message(tenant, request.ByteSize())
        self._check_labels(request.labels)
        check_roles(request.messages)
        check_leading(request.messages)
        check_tools(request.tools)
        check_params(request.default_params)
        salt = await self._directory.salt(tenant)
        asked = request.SerializeToString(deterministic=True)
        limit = self._config.admission.max_preamble_bytes
        if len(asked) > limit:
            raise InvalidRequest(f"the leading messages and tools have at most {limit} bytes")
        session_id = await self._directory.new_session_id(tenant, request.request_id)
        existing = await self._admitted(tenant, session_id)
        if existing is None:
            new = NewSession(
                session_id=session_id,
                tenant=tenant,
                model=self._model(request.model),
                preamble=asked,
                root_digest=RollingDigest(salt).position().digest,
                leading_digest=leading_digest(salt, request),
                labels=tuple(sorted(request.labels.items())),
            )
            outcome = await self._store.open_session(new)
            existing = outcome.session if isinstance(outcome, SessionWritten) else None
            if existing is not None:
                says = {a.TENANT: tenant, a.MODEL: new.model}
                self.services.tracing.opened(session_id, None, says)
        if existing is None or existing.tenant != tenant or existing.preamble != asked:
            raise RequestConflict(
                "the request id was used to open a session with other content, or one now gone"
            )
        self._directory.remember(existing)
        return session_pb2.OpenSessionResponse(session=session_to_pb(existing))

    async def get(
        self, tenant: str, request: session_pb2.GetSessionRequest
    ) -> session_pb2.GetSessionResponse:
        session = await self._directory.read(tenant, request.session_id)
        return session_pb2.GetSessionResponse(session=session_to_pb(session))

    async def list(
        self, tenant: str, request: session_pb2.ListSessionsRequest
    ) -> session_pb2.ListSessionsResponse:
        """One page of the index, filtered: may hold fewer than asked for."""
        count = request.page_size or DEFAULT_PAGE
        if count > MAX_PAGE:
            raise InvalidRequest(f"page_size is at most {MAX_PAGE}")
        states = frozenset(s for s, wire in SESSION_STATES.items() if wire in request.states)
        states = states or _OPEN_STATES
        wanted = set(request.labels.items())
        try:
            page = await self._store.list_sessions(tenant, request.page_token, count)
        except ValueError as error:
            raise InvalidRequest("page_token is none that a list gave") from error
        chosen = [
            session_to_pb(s)
            for s in page.sessions
            if s.tenant == tenant and s.state in states and wanted <= set(s.labels)
        ]
        return session_pb2.ListSessionsResponse(sessions=chosen, next_page_token=page.next_cursor)

    async def cancel_turn(
        self, tenant: str, request: session_pb2.CancelTurnRequest
    ) -> session_pb2.CancelTurnResponse:
        """The turn has ended when this returns; its owner is told so that it stops computing."""
        self._check_request_id(request.turn_id)
        known = await self._directory.find(tenant, request.session_id)
        outcome = await self._store.cancel_turn(request.session_id, request.turn_id)
        match outcome:
            case Missing():
                raise unknown_session(request.session_id)
            case TurnUnknown():
                return session_pb2.CancelTurnResponse(status=pb.TURN_STATUS_UNSPECIFIED)
            case TurnEnded(turn):
                if known.owner is not None:
                    limit_s = self._config.times.stop_turn_s
                    await self._tell(known.owner, request.session_id, request.turn_id, limit_s)
                return session_pb2.CancelTurnResponse(status=TURN_STATUSES[turn.status])

    async def fork(
        self, tenant: str, request: session_pb2.ForkSessionRequest
    ) -> session_pb2.ForkSessionResponse:
        """At a turn boundary; idempotent by request id."""
        self._check_request_id(request.request_id)
        self._check_labels(request.labels)
        parent = await self._settled(tenant, request.session_id)
        at = request.at_turn_index if request.HasField("at_turn_index") else None
        if at is not None and at > parent.turn_index:
            raise OutOfRange(
                f"the session has {parent.turn_index} ended turns, it cannot be forked after {at}",
                hint="Fork after at most as many turns as have ended, or leave at_turn_index out.",
            )
        child_id = await self._directory.new_fork_id(tenant, request.session_id, request.request_id)
        await self._admitted(tenant, child_id)
        labels = tuple(sorted(request.labels.items()))
        outcome = await self._store.fork(request.session_id, child_id, at, labels)
        match outcome:
            case SessionWritten(session):
                if session.labels != labels or not _forked_after(session, at):
                    raise RequestConflict(
                        "the request id was used to fork this session otherwise",
                        hint="Use a new request id for a new fork.",
                    )
                self._directory.remember(session)
                says = {a.TENANT: tenant, a.MODEL: session.model}
                self.services.tracing.opened(child_id, request.session_id, says)
                return session_pb2.ForkSessionResponse(session=session_to_pb(session))
            case Missing():
                raise unknown_session(request.session_id)
            case Refused():
                raise SessionClosed(
                    "the session is closed, or the fork that this request id made is",
                    hint="Fork another session, or with another request id.",
                    metadata={"session_id": parent.session_id},
                )
            case HeadMismatch():
                raise Unavailable("the ledger is being repaired", retry_after_ms=200)

    async def suspend(
        self, tenant: str, request: session_pb2.SuspendSessionRequest
    ) -> session_pb2.SuspendSessionResponse:
        """Frees what replicas hold; refused while a turn runs."""
        before = await self._settled(tenant, request.session_id)
        session = self._written(before, await self._store.suspend(request.session_id))
        await self._release(before, session)
        return session_pb2.SuspendSessionResponse(session=session_to_pb(session))

    async def resume(
        self, tenant: str, request: session_pb2.ResumeSessionRequest
    ) -> session_pb2.ResumeSessionResponse:
        """A suspended session takes turns again; it is placed when the next one comes."""
        before = await self._directory.read(tenant, request.session_id)
        session = self._written(before, await self._store.unsuspend(request.session_id))
        return session_pb2.ResumeSessionResponse(session=session_to_pb(session))

    async def close(
        self, tenant: str, request: session_pb2.CloseSessionRequest
    ) -> session_pb2.CloseSessionResponse:
        """Idempotent. A running turn ends CANCELLED; replicas drop the session's KV."""
        if request.retention_ms > MAX_RETENTION_MS:
            raise InvalidRequest(f"retention_ms is at most {MAX_RETENTION_MS}")
        before = await self._settled(tenant, request.session_id)
        retention = 0 if request.purge else (request.retention_ms or None)
        outcome = await self._store.close(request.session_id, retention)
        if isinstance(outcome, SessionWritten):
            self._directory.remember(outcome.session)
            await self._release(before, outcome.session)
        return session_pb2.CloseSessionResponse()

    async def transcript(
        self, tenant: str, request: session_pb2.GetTranscriptRequest
    ) -> session_pb2.GetTranscriptResponse:
        """Text comes from a replica with the session's tokenizer, owner or not."""
        if request.max_turns > MAX_PAGE:
            raise InvalidRequest(f"max_turns is at most {MAX_PAGE}")
        session = await self._directory.read(tenant, request.session_id)
        if session.turn_index == 0 and session.active_turn_id is None:
            return session_pb2.GetTranscriptResponse(session=session_to_pb(session))
        reader = self._assigner.reader_for(session)
        if reader is None:
            raise Unavailable(
                "no replica that could decode this session is up",
                retry_after_ms=self._config.admission.retry_after_ms,
            )
        answer = await self._replicas.at(reader.replica.details.endpoint).read_turns(
            replica_pb2.ReadTurnsRequest(request=request, tenant=tenant),
            self._config.times.replica_call_s,
        )
        # The record is ours to tell: the replica sends turns only.
        answer.transcript.session.CopyFrom(session_to_pb(session))
        return answer.transcript

    # -- parts ---------------------------------------------------------------------------------

    async def _admitted(self, tenant: str, session_id: str) -> Session | None:
        """The session; None if it is to be made. Raises QuotaExceeded."""
        most = self._quotas.of(tenant).sessions
        found = await self._store.find_or_admit(tenant, session_id, most)
        if isinstance(found, LimitReached):
            raise self._quotas.session_refused(tenant)
        return found

    def _model(self, asked: str) -> str:
        served = self._fleet.snapshot.models()
        if asked in served:
            return asked
        if not served:
            raise Unavailable(
                "no replica is up", retry_after_ms=self._config.admission.retry_after_ms
            )
        if not asked and len(served) == 1:
            return served[0]
        names = ", ".join(served)
        if not asked:
            raise InvalidRequest(f"name a model, the fleet serves several: {names}")
        raise NotFound(
            f"no replica serves {asked!r}",
            reason="MODEL_NOT_FOUND",
            hint=f"Use one of: {names}.",
        )

    def _written(self, before: Session, outcome: SessionWritten | Refused | Missing) -> Session:
        match outcome:
            case SessionWritten(session):
                self._directory.remember(session)
                return session
            case Missing():
                raise unknown_session(before.session_id)
            case Refused(state, turn_id):
                raise refusal(before, state, turn_id)

    async def _settled(self, tenant: str, session_id: str) -> Session:
        """The record, after its owner has put back what the store may have lost of it: what is
        done to a session next can make such a loss final (P1). An owner that does not answer soon
        is not waited for."""
        limit_s = self._config.times.settle_s
        known = (await self._directory.find(tenant, session_id)).owner
        if known is not None:
            await self._tell(known, session_id, "", limit_s)
        session = await self._directory.read(tenant, session_id)
        if session.owner is not None and session.owner != known:
            await self._tell(session.owner, session_id, "", limit_s)
            session = await self._directory.read(tenant, session_id)
        return session

    async def _release(self, before: Session, after: Session) -> None:
        """Tells whoever holds something of the session to drop it. The store has decided already: a
        replica that cannot be told learns it with its next write, or when it next asks the store.
        """
        owner = None if before.owner is None else before.owner.replica
        holders: dict[ReplicaRef | None, None] = {owner: None, before.previous_owner: None}
        for ref in filter(None, holders):
            replica = self._fleet.snapshot.get(ref)
            if replica is None or replica.stale:
                continue
            request = replica_pb2.ReleaseSessionRequest(
                session_id=after.session_id, epoch=epoch_to_pb(after.epoch), drop_kv=True
            )
            try:
                await self._replicas.at(replica.details.endpoint).release_session(
                    request, self._config.times.stop_turn_s
                )
            except SessileError as error:
                log.info("%s could not be told to drop %s: %s", ref, after.session_id, error)

    async def _tell(self, owner: Owner, session_id: str, turn_id: str, limit_s: float) -> None:
        """Has the owner look at what the store has: of a turn, that it was cancelled; of a session
        at rest, less than it holds."""
        replica = self._fleet.snapshot.get(owner.replica)
        if replica is None or replica.stale:
            return
        request = replica_pb2.StopTurnRequest(session_id=session_id, turn_id=turn_id)
        try:
            await self._replicas.at(replica.details.endpoint).stop_turn(request, limit_s)
        except SessileError as error:
            # It learns it from its next append.
            log.info("%s could not be told to look at %s: %s", owner.replica, session_id, error)

    def _check_request_id(self, value: str) -> None:
        limit = self._config.admission.max_id_chars
        if not 1 <= len(value) <= limit:
            raise InvalidRequest(f"idempotency keys have 1 to {limit} characters")

    def _check_labels(self, labels: Mapping[str, str]) -> None:
        admission = self._config.admission
        if len(labels) > admission.max_labels:
            raise InvalidRequest(f"at most {admission.max_labels} labels")
        longest = max((len(text) for pair in labels.items() for text in pair), default=0)
        if longest > admission.max_label_chars:
            raise InvalidRequest(f"labels have at most {admission.max_label_chars} characters")


def _forked_after(fork: Session, turns: int | None) -> bool:
    """Whether a fork may have been made after so many turns (None: those there were then). One that
    refers to no ancestor, for it inherited none or copied them, does not tell."""
    return turns is None or not fork.segments or fork.segments[-1].end_turn == turns


def refusal(session: Session, state: SessionState, turn_id: str | None) -> WrongState:
    """Why the store refused a change of a session."""
    if state is SessionState.OPEN and turn_id is not None:
        return TurnInProgress("a turn of the session is running", metadata={"turn_id": turn_id})
    return not_open(session.session_id, state)


def leading_digest(salt: bytes, request: session_pb2.OpenSessionRequest) -> bytes:
    """Names the leading messages and tools within the tenant; empty if there are none. Sessions
    with the same digest share their first tokens."""
    leading = session_pb2.OpenSessionRequest(messages=request.messages, tools=request.tools)
    body = leading.SerializeToString(deterministic=True)
    if not body:
        return b""
    return hashlib.blake2b(body, digest_size=16, key=salt, person=b"leading").digest()
