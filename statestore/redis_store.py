"""The whole store, as gateways use it: sessions, their owners, forks, moves, the fleet."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from statestore import keys, replies
from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import (
    CancelOutcome,
    EpochLost,
    ForkOutcome,
    HeadMismatch,
    LimitReached,
    Missing,
    OpenOutcome,
    PlaceOutcome,
    Refused,
    SessionWritten,
    StoreCorrupt,
    StoreError,
    StoreUnavailable,
    SwitchOutcome,
    TakeOutcome,
)
from statestore.records import (
    Epoch,
    Lease,
    NewSession,
    Position,
    ReplicaRecord,
    ReplicaRef,
    Session,
    SessionPage,
    SessionState,
    SweepReport,
)
from statestore.replies import Arg
from statestore.script_runner import script_call
from statestore.usage import RedisUsage

log = logging.getLogger(__name__)

MAX_PAGE = 1000
MAX_PAGE_BYTES = 8 << 20
"""Of preambles: a page that has more of them ends there."""
SESSIONS_PER_READ = 32
UNREADABLE_RETRY_MS = 60_000
"""Until a sweep looks again at a session whose record it cannot read."""
MAX_LATER = 1024
"""Changes of indices that nobody waits for; past it the oldest is left to a read of its index."""
MAX_LEFT_OUT = 64
"""Damaged records of replicas that are remembered, so that each is logged once."""

T = TypeVar("T")
_Written = SessionWritten | EpochLost | Refused | Missing


class RedisStore(RedisUsage):
    """SessionStore over scripts; see RedisJournal for what it raises, RedisUsage for usage.

    Indices (a tenant's sessions, a replica's sessions, sessions due for a sweep) are in other hash
    slots than the sessions, so they are written before them, beside them in the same pipeline; what
    they list is checked against the records when it is read. Nobody waits for the removal of what
    no longer belongs there: it goes with the next sweep, list or look at the fleet.
    """

    def __init__(self, executor: ScriptExecutor, **options: Any) -> None:
        super().__init__(executor, **options)
        self._later: deque[ScriptCall] = deque(maxlen=MAX_LATER)
        self._left_out: deque[str] = deque(maxlen=MAX_LEFT_OUT)

    # -- life of a session --------------------------------------------------------------------

    async def find_or_admit(
        self, tenant: str, session_id: str, most: int
    ) -> Session | LimitReached | None:
        room = script_call("index_room", [keys.tenant_index_key(tenant)], [session_id, most])
        read = script_call("read_session", [keys.session_key(session_id)], [])
        full, found = map(replies.outcome, await self._scripts.run(room, read))
        if isinstance(found, SessionWritten):
            return found.session
        return full if isinstance(full, LimitReached) else None

    async def open_session(self, new: NewSession) -> OpenOutcome:
        call = script_call(
            "open",
            [
                *_record_and_ledger(new.session_id),
                keys.refs_key(new.session_id),
            ],
            [
                new.session_id,
                new.tenant,
                new.model,
                new.preamble,
                new.root_digest,
                new.leading_digest,
                replies.encode_labels(new.labels),
            ],
        )
        index = self._index_tenant(new.tenant, new.session_id)
        outcome = replies.outcome((await self._scripts.run(index, call))[1])
        if not isinstance(outcome, OpenOutcome):
            raise replies.unexpected(outcome)
        return outcome

    async def suspend(self, session_id: str) -> SessionWritten | Refused | Missing:
        return await self._set_state(session_id, SessionState.SUSPENDED)

    async def unsuspend(self, session_id: str) -> SessionWritten | Refused | Missing:
        return await self._set_state(session_id, SessionState.OPEN)

    async def _set_state(
        self, session_id: str, state: SessionState
    ) -> SessionWritten | Refused | Missing:
        call = script_call("suspend", [keys.session_key(session_id)], [state.value])
        outcome = await self._outcome(call)
        if isinstance(outcome, SessionWritten):
            self._unindex_previous(outcome.session)
        if not isinstance(outcome, SessionWritten | Refused | Missing):
            raise replies.unexpected(outcome)
        return outcome

    async def close(self, session_id: str, retention_ms: int | None) -> SessionWritten | Missing:
        asked = retention_ms is not None
        wanted = self._limits.default_retention_ms if retention_ms is None else retention_ms
        kept_ms = min(max(wanted, 0), self._limits.max_retention_ms)
        call = script_call("close", [keys.session_key(session_id)], [kept_ms, int(asked)])
        # If nothing is kept, the sweep is for a purge that does not come.
        due = self._due(session_id, kept_ms or self._limits.index_grace_ms)
        outcome = replies.outcome((await self._scripts.run(due, call))[1])
        if not isinstance(outcome, SessionWritten | Missing):
            raise replies.unexpected(outcome)
        if isinstance(outcome, SessionWritten):
            if kept_ms == 0:
                await self._purge(outcome.session)
                await self._tidy_indices()
            else:
                self._unindex_previous(outcome.session)
        return outcome

    async def _purge(self, session: Session) -> bool:
        """Deletes a closed session past its retention; True if it is gone. A session has the same
        ancestors for life, so they can be named from a record read earlier."""
        session_id = session.session_id
        ancestors = [segment.ancestor_id for segment in session.segments]
        call = script_call(
            "purge",
            [
                *_record_and_ledger(session_id),
                keys.refs_key(session_id),
                *(key for ancestor in ancestors for key in _record_and_ledger(ancestor)),
            ],
            [self._limits.purged_ttl_ms, session_id, *ancestors],
        )
        due = self._due(session_id, self._limits.purged_ttl_ms)
        (_, reply) = await self._scripts.run(due, call)
        if isinstance(replies.outcome(reply), Refused):
            return False
        self._unindex(keys.tenant_index_key(session.tenant), session_id, min_age_ms=0)
        self._unindex_previous(session)
        return True

    async def fork(
        self,
        session_id: str,
        child_id: str,
        at_turn_index: int | None,
        labels: tuple[tuple[str, str], ...],
    ) -> ForkOutcome:
        if keys.family_of(child_id) != keys.family_of(session_id):
            raise ValueError(f"{child_id} is not of the family of {session_id}")
        parent = await self.get_session(session_id)
        if parent is None:
            return Missing()
        sources = [*(segment.ancestor_id for segment in parent.segments), session_id]
        call = script_call(
            "fork",
            [
                keys.session_key(session_id),
                keys.session_key(child_id),
                keys.refs_key(session_id),
                keys.ledger_key(child_id),
                *(key for source in sources for key in _record_and_ledger(source)),
            ],
            [
                session_id,
                child_id,
                "" if at_turn_index is None else at_turn_index,
                replies.encode_labels(labels),
                self._limits.max_segments,
            ],
        )
        index = self._index_tenant(parent.tenant, child_id)
        outcome = replies.outcome((await self._scripts.run(index, call))[1])
        if not isinstance(outcome, ForkOutcome):
            raise replies.unexpected(outcome)
        return outcome

    async def cancel_turn(self, session_id: str, turn_id: str) -> CancelOutcome:
        call = script_call(
            "cancel",
            [keys.session_key(session_id)],
            [turn_id, self._limits.tombstone_ttl_ms, self._limits.max_tombstones],
        )
        outcome = await self._outcome(call)
        if not isinstance(outcome, CancelOutcome):
            raise replies.unexpected(outcome)
        return outcome

    # -- ownership ----------------------------------------------------------------------------

    async def place(
        self, session_id: str, expected: Epoch, owner: ReplicaRef, nonce: bytes
    ) -> PlaceOutcome:
        return await self._grant("place", session_id, expected, owner, nonce)

    async def take(
        self, session_id: str, expected: Epoch, owner: ReplicaRef | None, nonce: bytes
    ) -> TakeOutcome:
        return await self._grant("take", session_id, expected, owner, nonce)

    async def _grant(
        self, script: str, session_id: str, expected: Epoch, owner: ReplicaRef | None, nonce: bytes
    ) -> _Written:
        call = script_call(
            script,
            [keys.session_key(session_id)],
            [
                expected.number,
                expected.nonce,
                owner.replica_id if owner else "",
                owner.incarnation if owner else 0,
                nonce,
            ],
        )
        calls = [self._index_replica(session_id, owner), call] if owner else [call]
        outcome = _written(replies.outcome((await self._scripts.run(*calls))[-1]))
        if isinstance(outcome, SessionWritten):
            self._unindex_previous(outcome.session)
        return outcome

    async def begin_migration(
        self, session_id: str, epoch: Epoch, migration_id: str, target: ReplicaRef, lease_ms: int
    ) -> _Written:
        call = script_call(
            "begin_migration",
            [keys.session_key(session_id)],
            [
                epoch.number,
                epoch.nonce,
                migration_id,
                target.replica_id,
                target.incarnation,
                lease_ms,
            ],
        )
        # Indexed under the target already, because the switch does not know it.
        return _written(
            replies.outcome(
                (await self._scripts.run(self._index_replica(session_id, target), call))[1]
            )
        )

    async def switch_migration(
        self,
        session_id: str,
        epoch: Epoch,
        migration_id: str,
        verified: Position,
        active_turn_id: str | None,
        nonce: bytes,
    ) -> SwitchOutcome:
        call = script_call(
            "switch_migration",
            [keys.session_key(session_id)],
            [
                epoch.number,
                epoch.nonce,
                migration_id,
                verified.length,
                verified.digest,
                active_turn_id or "",
                nonce,
            ],
        )
        found = await self._outcome(call)
        if isinstance(found, HeadMismatch):
            return found
        outcome = _written(found)
        if isinstance(outcome, SessionWritten):
            session = outcome.session
            if session.owner is not None:
                # Again: a long copy may have outlived the grace of the entry made at its begin.
                self._later.append(self._index_replica(session_id, session.owner.replica))
            self._unindex_previous(session)
        return outcome

    async def abort_migration(self, session_id: str, migration_id: str) -> None:
        await self._outcome(
            script_call("abort_migration", [keys.session_key(session_id)], [migration_id])
        )

    # -- indices ------------------------------------------------------------------------------

    async def list_sessions(self, tenant: str, cursor: str, count: int) -> SessionPage:
        key = keys.tenant_index_key(tenant)
        count = min(max(count, 1), MAX_PAGE)
        sessions: list[Session] = []
        size = 0
        while count and size <= MAX_PAGE_BYTES:
            wanted = min(count, SESSIONS_PER_READ)
            entries = await self._index_page(key, cursor, wanted)
            for session_id, session in await self._read_sessions([entry for entry, _ in entries]):
                if session is None:
                    self._unindex(key, session_id)
                else:
                    sessions.append(session)
                    size += len(session.preamble)
            count -= wanted
            cursor = entries[-1][1] if len(entries) == wanted else ""
            if not cursor:
                break
        await self._tidy_indices()
        return SessionPage(tuple(sessions), cursor)

    async def sessions_of(self, ref: ReplicaRef, count: int) -> tuple[str, ...]:
        key = keys.replica_index_key(ref)
        found: list[str] = []
        cursor = ""
        while len(found) < count:
            entries = await self._index_page(key, cursor, SESSIONS_PER_READ)
            for session_id, session in await self._read_sessions([entry for entry, _ in entries]):
                if session is None or session.owner is None or session.owner.replica != ref:
                    self._unindex(key, session_id)
                else:
                    found.append(session_id)
            if len(entries) < SESSIONS_PER_READ:
                break
            cursor = entries[-1][1]
        await self._tidy_indices()
        return tuple(found[:count])

    async def _read_sessions(self, session_ids: list[str]) -> list[tuple[str, Session | None]]:
        """Without the damaged ones: for one of them nobody loses sight of the rest."""
        valid = [session_id for session_id in session_ids if keys.is_session_id(session_id)]
        found = await self._scripts.run_each(
            *(script_call("read_session", [keys.session_key(i)], []) for i in valid)
        )
        sessions: dict[str, Session | None] = dict.fromkeys(session_ids)
        for session_id, reply in zip(valid, found, strict=True):
            try:
                if isinstance(reply, StoreError):
                    raise reply
                outcome = replies.outcome(reply)
            except StoreCorrupt as error:
                log.error("session %s is left out of a list: %s", session_id, error)
                del sessions[session_id]
            else:
                if isinstance(outcome, SessionWritten):
                    sessions[session_id] = outcome.session
        return list(sessions.items())

    def _index_tenant(self, tenant: str, session_id: str) -> ScriptCall:
        return script_call("index_add", [keys.tenant_index_key(tenant)], [session_id, 1])

    def _unindex_previous(self, session: Session) -> None:
        """After a change of owner."""
        if session.previous_owner is not None:
            key = keys.replica_index_key(session.previous_owner)
            self._unindex(key, session.session_id)

    def _unindex(self, key: str, session_id: str, min_age_ms: int | None = None) -> None:
        age_ms = self._limits.index_grace_ms if min_age_ms is None else min_age_ms
        self._later.append(script_call("index_drop", [key], [session_id, 1000 * age_ms]))

    async def _tidy_indices(self) -> None:
        """One attempt: what is left in an index is dropped when it is next read."""
        calls = list(self._later)
        self._later.clear()
        for result in await self._scripts.once(calls) if calls else ():
            if isinstance(result, Exception) and not isinstance(result, StoreUnavailable):
                raise result

    # -- fleet and duties ---------------------------------------------------------------------

    async def fleet(self) -> tuple[ReplicaRecord, ...]:
        call = script_call("fleet", [keys.FLEET], [self._limits.replica_record_ttl_ms])
        (reply,) = await self._scripts.run(call)
        present, past = replies.items(reply)
        for ref in self._readable(past, lambda item: replies.replica_ref(*replies.items(item))):
            self._later.append(script_call("index_delete", [keys.replica_index_key(ref)], []))
        await self._tidy_indices()
        return tuple(self._readable(present, replies.replica_record))

    def _readable(self, listed: Reply, read: Callable[[Reply], T]) -> list[T]:
        """Without the damaged ones: for one of them nobody loses sight of the rest."""
        found: list[T] = []
        for item in replies.items(listed):
            try:
                found.append(read(item))
            except StoreCorrupt as error:
                if str(error) not in self._left_out:
                    self._left_out.append(str(error))
                    log.error("fleet: a replica is left out, its record is damaged: %s", error)
        return found

    async def acquire_lease(self, name: str, holder: str, ttl_ms: int) -> Lease | None:
        call = script_call("acquire_lease", [keys.lease_key(name)], [holder, ttl_ms])
        (reply,) = await self._scripts.run(call)
        status, *rest = replies.items(reply)
        return Lease(name, holder, replies.number(rest[0])) if status == b"acquired" else None

    async def release_lease(self, lease: Lease) -> None:
        await self._status(
            script_call("release_lease", [keys.lease_key(lease.name)], [lease.holder, lease.token])
        )

    async def sweep(self, count: int) -> SweepReport:
        (listed,) = await self._scripts.run(script_call("due_list", [keys.DUE], [count]))
        flat = [replies.text(item) for item in replies.items(listed)]
        due = list(zip(flat[::2], flat[1::2], strict=True))
        if not due:
            return SweepReport()
        valid = [(session_id, score) for session_id, score in due if keys.is_session_id(session_id)]
        found = await self._scripts.run_each(
            *(script_call("sweep", [keys.session_key(i), keys.refs_key(i)], [i]) for i, _ in valid)
        )
        expired: list[tuple[str, str]] = []
        purged: list[str] = []
        fixes = [
            script_call("due_fix", [keys.DUE], [*entry, ""]) for entry in due if entry not in valid
        ]
        for (session_id, score), reply in zip(valid, found, strict=True):
            try:
                next_ms = await self._swept(session_id, reply, expired, purged)
            except StoreCorrupt as error:
                log.error("sweep: session %s is left as it is: %s", session_id, error)
                next_ms = UNREADABLE_RETRY_MS
            fixes.append(script_call("due_fix", [keys.DUE], [session_id, score, next_ms]))
        # Not repeated either: the server may have lost meanwhile what the sweep saw. Whoever is not
        # filed is looked at again.
        self._later.extend(fixes)
        await self._tidy_indices()
        return SweepReport(tuple(expired), tuple(purged), len(due))

    async def _swept(
        self,
        session_id: str,
        reply: Reply | StoreError,
        expired: list[tuple[str, str]],
        purged: list[str],
    ) -> Arg:
        """Notes what a sweep did with a session; returns ms until it is due next, or ''."""
        if isinstance(reply, StoreError):
            raise reply
        outcome = replies.outcome(reply)
        if isinstance(outcome, SessionWritten):
            # Refused if the clock stepped back meanwhile: looked at again in the next sweep.
            if not await self._purge(outcome.session):
                return 0
            purged.append(session_id)
        elif outcome is None:
            _, turn_id, due_in_ms = replies.items(reply)
            if turn_id:
                expired.append((session_id, replies.text(turn_id)))
            return replies.data(due_in_ms)
        return ""


def _record_and_ledger(session_id: str) -> tuple[str, str]:
    return keys.session_key(session_id), keys.ledger_key(session_id)


def _written(found: object) -> _Written:
    if not isinstance(found, _Written):
        raise replies.unexpected(found)
    return found
