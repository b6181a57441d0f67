"""Sessions whose tokens this replica holds in memory, and the pins on their KV pages.

Soft state throughout: everything here can be dropped and rebuilt from the ledger. What is held is
always a copy of acknowledged ledger content, so after the store lost writes the owner can put them
back from here (P1). Pages go with the last that is known of their session: what cannot be named
could not be dropped when the session is closed (I9).
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from gateway.core.errors import DataLoss, MigrationRefused, Unavailable
from statestore.digest import RollingDigest, pack_tokens
from statestore.ports import JournalPort, StoreError, StoreUnavailable
from statestore.records import (
    NO_EPOCH,
    Epoch,
    LedgerPiece,
    Position,
    ReplicaRef,
    Session,
    SessionState,
    Turn,
)
from statestore.replica_info import MAX_LEADING
from workers.engines.port import Engine, EngineInfo
from workers.kv.blocks import page_name

log = logging.getLogger(__name__)

MAX_RECENT_TURNS = 16
"""Ended turns kept per session for a repair; if the store lost more, the loss is reported."""


@dataclass(slots=True)
class ResidentSession:
    """One session's ledger in memory. Mutable; grows only by what the store acknowledged."""

    session_id: str
    salt: bytes
    digest: RollingDigest
    epoch: Epoch = NO_EPOCH
    """Epoch under which this replica last wrote the session; NO_EPOCH for a mere copy."""
    tokens: array[int] = field(default_factory=lambda: array("I"))
    turn_index: int = 0
    """Turns ended, as far as this replica knows; meaningful under :attr:`epoch`."""
    recent: deque[Turn] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TURNS))
    """The last turns, if they ended here under :attr:`epoch`; in order, without gaps."""
    given: bool = False
    """The store has it as this replica's, or on its way here, as far as is known, under an epoch
    under which nothing was written here yet. Not together with an :attr:`epoch`."""
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def head(self) -> Position:
        return self.digest.position()

    @property
    def ours(self) -> bool:
        """Whether this replica owns the session, as far as it knows."""
        return self.given or self.epoch != NO_EPOCH

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens that are in the ledger."""
        self.tokens.extend(tokens)
        self.digest.update(tokens)

    def own(self, epoch: Epoch, turn_index: int) -> None:
        """Starts to speak for the session under ``epoch``; what an earlier epoch knew of ended
        turns no longer counts, nor what was known before a turn that ended elsewhere: a repair
        could not put that one back."""
        if epoch != self.epoch or (self.recent and self.recent[-1].index + 1 != turn_index):
            self.recent.clear()
        self.epoch = epoch
        self.turn_index = turn_index
        self.given = False

    def ended(self, turn: Turn) -> None:
        """A turn of this session ended here."""
        self.recent.append(turn)
        self.turn_index = turn.index + 1

    def digest_at(self, length: int) -> bytes:
        """Ledger digest after ``length`` tokens; hashes all of them again."""
        return RollingDigest.of(self.salt, self.tokens[:length]).position().digest

    def block_hashes(self, info: EngineInfo) -> list[bytes]:
        """Names of the whole pages, as ``workers/kv/blocks.py`` defines them; only pages that
        filled since the last call are hashed. The list grows with the session: copy to keep."""
        size, hashes = info.page_size, self._hashes
        for start in range(len(hashes) * size, len(self.tokens) - size + 1, size):
            hashes.append(self._name(info, hashes, self.tokens[start : start + size]))
        return hashes

    def block_hashes_with(self, info: EngineInfo, more: Sequence[int]) -> list[bytes]:
        """The same with tokens ``more`` behind the ledger's end."""
        size, hashes = info.page_size, list(self.block_hashes(info))
        rest = [*self.tokens[len(hashes) * size :], *more]
        for start in range(0, len(rest) - size + 1, size):
            hashes.append(self._name(info, hashes, rest[start : start + size]))
        return hashes

    def _name(self, info: EngineInfo, hashes: Sequence[bytes], page: Sequence[int]) -> bytes:
        previous = hashes[-1] if hashes else None
        packed = pack_tokens(page)
        return page_name(info.kv_fingerprint, self.salt, info.public, previous, packed)


class Residency:
    """The replica's resident sessions, least recently used first out.

    Bounded in sessions and in tokens; sessions with a running turn (``busy``) are never evicted,
    and their number is bounded by the turns that run or queue.
    """

    def __init__(
        self,
        engine: Engine,
        ref: ReplicaRef,
        *,
        max_sessions: int,
        max_tokens: int,
        pin_ttl_s: float,
    ) -> None:
        self._engine = engine
        self._ref = ref
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._pin_ttl_s = pin_ttl_s
        self._sessions: OrderedDict[str, ResidentSession] = OrderedDict()
        self._busy: set[str] = set()
        self._leading: OrderedDict[bytes, list[bytes]] = OrderedDict()
        self._doubt = anyio.Event()

    def idle_ids(self) -> list[str]:
        """Ids of all sessions held without a running turn, as their owner or not."""
        return [session_id for session_id in self._sessions if session_id not in self._busy]

    def session_ids(self) -> list[str]:
        """Ids of the sessions held as their owner, sorted."""
        return sorted(s.session_id for s in self._sessions.values() if s.ours)

    def owned_tokens(self) -> int:
        """Length of the ledgers of the sessions held as their owner, together."""
        return sum(len(s.tokens) for s in self._sessions.values() if s.ours)

    def get(self, session_id: str) -> ResidentSession | None:
        return self._sessions.get(session_id)

    async def load(
        self,
        store: JournalPort,
        session: Session,
        salt: bytes,
        known: LedgerPiece | None = None,
        *,
        importing: bool = False,
    ) -> ResidentSession:
        """The session's ledger up to ``session.head``, verified by its digest; reads only what is
        neither resident nor ``known`` from a read before. Raises DataLoss if the ledger does not
        match its own digest, Unavailable if it changed while it was read, MigrationRefused if an
        ``importing`` caller would replace what a turn or the owner holds, and what the store
        raises."""
        session_id = session.session_id
        while True:
            resident = self._sessions.get(session_id)
            if resident is not None and await self._catch_up(store, resident, session, known):
                found = resident
            else:
                found = await self._read(store, session, salt, known)
            if self._sessions.get(session_id) in (None, resident):
                break  # else another call has put its copy there meanwhile: see whether it serves
        if found is not resident:
            owned = resident is not None and resident.epoch != NO_EPOCH
            if importing and (owned or session_id in self._busy):
                raise MigrationRefused(f"session {session_id} is held here as its owner")
        found.given |= importing and found.epoch == NO_EPOCH
        self._sessions[session_id] = found  # it may have been let go of meanwhile
        self._sessions.move_to_end(session_id)
        if found is not resident:
            if resident is not None:
                self.pin(session_id, self._pin_ttl_s)  # keeps what both have in common
                self._engine.drop(resident.block_hashes(self._engine.info))
            self._shrink()
        return found

    async def _read(
        self, store: JournalPort, session: Session, salt: bytes, known: LedgerPiece | None
    ) -> ResidentSession:
        fresh = ResidentSession(session.session_id, salt, RollingDigest(salt))
        # Once more without ``known``: the ledger may have been repaired since that was read.
        if not (
            await self._catch_up(store, fresh, session, known)
            or await self._catch_up(store, fresh, session)
        ):
            now = await store.get_session(session.session_id)
            if now is None or now.version != session.version:
                raise Unavailable(f"session {session.session_id} changed while it was read")
            raise DataLoss(
                f"session {session.session_id}: the ledger's tokens do not match its digest"
            )
        return fresh

    async def _catch_up(
        self,
        store: JournalPort,
        resident: ResidentSession,
        session: Session,
        known: LedgerPiece | None = None,
    ) -> bool:
        """Brings a copy to the session's head, if the copy is a prefix of it."""
        have, want = len(resident.tokens), session.head.length
        if have > want:
            return False
        missing = await store.read_tokens(session, have, want, known) if want > have else []
        if len(missing) != want - have:
            raise Unavailable(f"session {session.session_id}: the ledger changed while it was read")
        state = resident.digest.copy()
        state.update(missing)
        if state.position().digest != session.head.digest or len(resident.tokens) != have:
            return False
        resident.extend(missing)
        return True

    def hold(self, session_id: str) -> None:
        """A turn runs: the session stays until :meth:`rest`."""
        self._busy.add(session_id)

    def rest(self, session_id: str, unwritten: Sequence[int] = ()) -> None:
        """The turn ended: its KV is pinned softly for the gap until the next one, if there will be
        one here. KV of what was generated but not written to the ledger is freed: nothing will ever
        ask for it, nor name it when the session is closed."""
        self._busy.discard(session_id)
        resident = self._sessions.get(session_id)
        if resident is not None:
            self.pin(session_id, self._pin_ttl_s)
            if unwritten:
                self._engine.drop(resident.block_hashes_with(self._engine.info, unwritten))
            if resident.ours:
                self._sessions.move_to_end(session_id)
            else:
                self._engine.unpin(session_id)
        self._shrink()

    def disown(self, session_id: str, epoch: Epoch | None = None) -> None:
        """Somebody else owns the session now: what is held is a mere copy. ``epoch``: that of the
        run that was told so. What is held under another one stays this replica's: nobody else could
        put it back if the store lost it, and the store may have lost that run's epoch itself."""
        resident = self._sessions.get(session_id)
        if resident is not None and (epoch is None or resident.epoch == epoch):
            resident.own(NO_EPOCH, resident.turn_index)
            self._engine.unpin(session_id)

    def pin(self, session_id: str, ttl_s: float) -> None:
        """Pins what is resident of the session's pages."""
        resident = self._sessions[session_id]
        self._engine.pin(session_id, resident.block_hashes(self._engine.info), ttl_s)

    def release(self, session_id: str, *, drop_kv: bool) -> None:
        """Lets go of a session: with ``drop_kv`` of everything, else a mere copy stays, whose pages
        may serve as cache."""
        resident = self._sessions.get(session_id)
        if not drop_kv:
            self.disown(session_id)
        elif resident is not None:
            self.discard(resident)

    def discard(self, resident: ResidentSession) -> None:
        """Forgets a session and frees its pages."""
        self._sessions.pop(resident.session_id, None)
        self._engine.unpin(resident.session_id)
        self._engine.drop(resident.block_hashes(self._engine.info))

    async def look(self, store: JournalPort, session_id: str) -> bool:
        """Asks the store what became of an idle session, and lets go of one that was closed,
        suspended or purged, or that is not ours any more. Whoever did that may not have reached
        this replica. Returns False if the store does not answer."""
        try:
            session = await store.get_session(session_id)
        except StoreError as error:
            log.warning("the store cannot tell what became of %s: %s", session_id, error)
            return not isinstance(error, StoreUnavailable)
        self.sort_out(session_id, session)
        return True

    def sort_out(self, session_id: str, session: Session | None) -> ResidentSession | None:
        """Lets go of an idle session that is, as the store has it, closed, suspended, purged or not
        ours any more; notes one that was given to us (who moves it here does not tell us so).
        Returns what is still held as its owner that wrote it."""
        resident = self._sessions.get(session_id)
        if resident is None or session_id in self._busy:
            return None
        if session is None or session.state is not SessionState.OPEN:
            self.discard(resident)
            return None
        written = session.owner is not None and session.owner.epoch == resident.epoch
        if session.epoch >= resident.epoch and not written:  # below: the store lost what we hold
            if self._comes_to_us(session):
                resident.own(NO_EPOCH, resident.turn_index)
                resident.given = True
            elif resident.ours:
                self.disown(session_id)
        return resident if resident.epoch != NO_EPOCH else None

    def _comes_to_us(self, session: Session) -> bool:
        """Whether it is this replica's, or a move to here is under way."""
        owner, migration = session.owner, session.migration
        ours = owner is not None and owner.replica == self._ref
        return ours or (migration is not None and migration.target == self._ref)

    def doubt(self) -> None:
        """The store was seen to have lost writes: of every session held here it may have less."""
        self._doubt.set()

    async def doubted(self, timeout_s: float) -> bool:
        """Waits for the next doubt; False after ``timeout_s`` without one. Each is told once."""
        with anyio.move_on_after(timeout_s):
            await self._doubt.wait()
        told = self._doubt.is_set()
        self._doubt = anyio.Event()
        return told

    def knows_leading(self, digest: bytes) -> bool:
        """Whether these leading messages were noted before; counts as a use."""
        known = digest in self._leading
        if known:
            self._leading.move_to_end(digest)
        return known

    def note_leading(self, digest: bytes, tokens: Sequence[int], salt: bytes) -> None:
        """Remembers which pages a session's leading messages became, for placement by prefix."""
        if not digest:
            return
        self._leading[digest] = self._engine.block_hashes(salt, tokens)
        self._leading.move_to_end(digest)
        while len(self._leading) > MAX_LEADING:
            self._leading.popitem(last=False)

    def leading_tokens(self) -> dict[str, int]:
        """Hex leading digest -> tokens of that prefix whose KV is resident now."""
        page_size = self._engine.info.page_size
        resident = {
            digest.hex(): self._engine.reusable_pages(hashes) * page_size
            for digest, hashes in self._leading.items()
        }
        return {digest: tokens for digest, tokens in resident.items() if tokens}

    def _shrink(self) -> None:
        total = sum(len(s.tokens) for s in self._sessions.values())
        for session_id in list(self._sessions):
            if len(self._sessions) <= self._max_sessions and total <= self._max_tokens:
                return
            if session_id not in self._busy:
                total -= len(self._sessions[session_id].tokens)
                self.discard(self._sessions[session_id])
