"""Finding the replica that serves a session now: its owner, or one chosen and written by
compare-and-set. A loser of a race re-reads and follows the winner."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import anyio

from gateway.app.directory import (
    KnownSession,
    SessionDirectory,
    placement_request,
    unknown_session,
)
from gateway.app.fleet_view import FleetView
from gateway.app.ports import Ids
from gateway.config import GatewayConfig
from gateway.core.errors import (
    NotFound,
    SessileError,
    SessionClosed,
    SessionSuspended,
    Unavailable,
    WrongState,
)
from gateway.core.fleet import Replica
from gateway.core.machines import ReplicaState
from gateway.core.placement import Decision, Holder, NoCandidate, PlacementRequest, place, relieve
from statestore.ports import (
    EpochLost,
    Missing,
    PlaceOutcome,
    Refused,
    SessionStore,
    SessionWritten,
)
from statestore.records import Epoch, Owner, Session, SessionState, Turn

log = logging.getLogger(__name__)

MAX_RACES = 8
"""Lost compare-and-sets in a row before the caller is told to try again."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The replica to dispatch to, and the ownership it acts under."""

    owner: Owner
    replica: Replica
    pull_from: Replica | None = None
    """Pull the KV prefix from there first."""
    decision: Decision | None = None
    """Why it is this one, if ownership was written for it just now."""
    taken: bool = False
    """It was written over another owner's."""


class Assigner:
    """Decides and writes ownership."""

    def __init__(
        self,
        store: SessionStore,
        directory: SessionDirectory,
        fleet: FleetView,
        ids: Ids,
        config: GatewayConfig,
    ) -> None:
        self._store = store
        self._directory = directory
        self._fleet = fleet
        self._ids = ids
        self._model = config.placement
        self._takeovers = anyio.CapacityLimiter(config.tables.takeovers)

    def current(self, owner: Owner) -> Assignment | None:
        """The owner if its process is known and not DOWN: no I/O, the path of every sticky turn."""
        replica = self._fleet.snapshot.get(owner.replica)
        if replica is None or replica.state is ReplicaState.DOWN:
            return None
        return Assignment(owner, replica)

    async def assign(
        self, session: Session, lost: Owner | None, new_tokens: int, *, batch: bool = False
    ) -> Assignment | NoCandidate:
        """The session's owner, placing it if it has none and taking it if its owner is ``lost`` or
        DOWN. ``batch``: for a batch turn that is not accepted yet. Raises WrongState unless the
        session is OPEN, NotFound, Unavailable, StoreError."""
        async with self._takeovers:
            for _ in range(MAX_RACES):
                if session.state is not SessionState.OPEN:
                    raise not_open(session.session_id, session.state)
                if session.owner is not None and session.owner != lost:
                    assignment = await self._alive(session.owner)
                    if assignment is not None:
                        return assignment
                request = await self._request(session, new_tokens, batch)
                decision = place(self._fleet.snapshot, request, self._model)
                if isinstance(decision, NoCandidate):
                    return decision
                written = await self._write(
                    session.session_id, session.epoch, session.owner is not None, decision
                )
                if isinstance(written, Assignment):
                    return written
                session = written
        raise Unavailable(
            "the session's owner changes faster than it can be followed", retry_after_ms=200
        )

    async def retake(
        self,
        known: KnownSession,
        lost: Owner,
        head_tokens: int,
        new_tokens: int,
        *,
        batch: bool = False,
    ) -> Assignment | None:
        """Takes a session from its lost owner by what is remembered of it, without reading it
        before: during a fail-over every round trip is heard. None if that does not do: read it and
        :meth:`assign`. ``head_tokens``: of its ledger, as far as the caller has seen it."""
        owner = self._fleet.snapshot.get(lost.replica)
        if known.owner != lost or known.request is None or owner is None:
            return None
        request = replace(
            known.request,
            history_tokens=max(known.request.history_tokens, head_tokens),
            new_tokens=new_tokens,
            batch=batch,
            token_fingerprint=owner.details.token_fingerprint,
        )
        async with self._takeovers:
            decision = place(self._fleet.snapshot, request, self._model)
            if isinstance(decision, NoCandidate):
                return None
            try:
                written = await self._write(known.session_id, lost.epoch, True, decision)
            except WrongState:
                return None
        return written if isinstance(written, Assignment) else None

    async def relieve(
        self, session: Session, owner: Owner, new_tokens: int, *, batch: bool = False
    ) -> Assignment | None:
        """Another owner for an idle session whose own has no place for its next turn; None if it
        is not idle, or nobody would be quicker than the wait. Raises StoreError."""
        full = self._fleet.snapshot.get(owner.replica)
        if session.owner != owner or session.active_turn_id is not None or full is None:
            return None
        request = await self._request(session, new_tokens, batch)
        decision = relieve(self._fleet.snapshot, request, full, self._model)
        if isinstance(decision, NoCandidate):
            return None
        written = await self._write(session.session_id, session.epoch, True, decision)
        return written if isinstance(written, Assignment) else None

    def reader_for(self, session: Session) -> Assignment | None:
        """Somebody who can decode the session's ledger: its owner, else any live replica with its
        token fingerprint. Ownership is not needed to read."""
        if session.owner is not None:
            owner = self.current(session.owner)
            if owner is not None:
                return owner
        fingerprint = session.token_fingerprint.hex()
        readers = [
            r
            for r in self._fleet.snapshot.replicas
            if r.state in (ReplicaState.READY, ReplicaState.DRAINING)
            and not r.stale
            and r.details.model == session.model
            and fingerprint in ("", r.details.token_fingerprint)
        ]
        if not readers:
            return None
        reader = min(readers, key=lambda r: (r.turns, r.ref.replica_id))
        return Assignment(Owner(reader.ref, session.epoch), reader)

    async def _alive(self, owner: Owner) -> Assignment | None:
        assignment = self.current(owner)
        if assignment is None and self._fleet.snapshot.get(owner.replica) is None:
            # Perhaps it registered since the last poll: ask before judging it gone.
            await self._fleet.refresh()
            assignment = self.current(owner)
        return assignment

    async def _request(self, session: Session, new_tokens: int, batch: bool) -> PlacementRequest:
        request = replace(placement_request(session), new_tokens=new_tokens, batch=batch)
        if session.parent_id is None or not session.own_base:
            return request
        parent = await self._store.get_session(session.parent_id)
        if parent is None or parent.owner is None:
            return request
        inherited = Holder(parent.owner.replica, session.own_base)
        return replace(request, holders=(*request.holders, inherited))

    async def _write(
        self, session_id: str, epoch: Epoch, owned: bool, decision: Decision
    ) -> Assignment | Session:
        """The session as it is now, if ``epoch`` is no longer its own. Raises WrongState, NotFound,
        StoreError."""
        target, nonce = decision.replica, self._ids.nonce()
        write = self._store.take if owned else self._store.place
        outcome: PlaceOutcome = await write(session_id, epoch, target.ref, nonce)
        match outcome:
            case SessionWritten(written):
                self._directory.remember(written)
                self._fleet.assume_session(
                    written.session_id, target.ref, written.leading_digest.hex()
                )
                log.info("%s goes to %s: %s", written.session_id, target.ref, decision)
                if written.owner is None:
                    raise SessileError(f"{written.session_id} was placed but has no owner")
                return Assignment(written.owner, target, decision.pull_from, decision, owned)
            case EpochLost(now):
                self._directory.remember(now)
                return now
            case Refused(state):
                raise not_open(session_id, state)
            case Missing():
                raise unknown_session(session_id)


def not_open(session_id: str, state: SessionState) -> WrongState:
    """Why a session that is not OPEN takes no turn."""
    metadata = {"session_id": session_id}
    if state is SessionState.CLOSED:
        return SessionClosed("the session is closed", metadata=metadata)
    if state is SessionState.SUSPENDED:
        return SessionSuspended("the session is suspended", metadata=metadata)
    return WrongState("the session cannot do this now", metadata=metadata)


def unknown_turn(session_id: str, turn_id: str) -> NotFound:
    """For attach-only calls and turns that were never accepted."""
    return NotFound(
        "no such turn in this session",
        reason="TURN_NOT_FOUND",
        metadata={"session_id": session_id, "turn_id": turn_id},
    )


def ended(turn: Turn | None) -> bool:
    """The turn can be replayed from the ledger by anybody."""
    return turn is not None and turn.status.ended
