"""An owner of a session that keeps its own copy of the ledger, as a replica does."""

from __future__ import annotations

from collections.abc import Sequence

from statestore.digest import RollingDigest
from statestore.ports import (
    Append,
    AppendOutcome,
    BeginOutcome,
    Repair,
    SessionStore,
    SessionWritten,
    StoreError,
    TurnBegun,
)
from statestore.records import (
    Epoch,
    FinishReason,
    NewSession,
    Position,
    ReplicaRef,
    Session,
    Turn,
    TurnResult,
    TurnSpec,
    TurnStatus,
)
from statestore.records import Owner as Ownership

TENANT = "acme"
SALT = b"s" * 32
EMPTY = RollingDigest(SALT).position()
FINGERPRINT = b"tokenizer"
STOP = TurnResult(TurnStatus.COMMITTED, FinishReason.STOP, text_end=11, usage=b"usage")
A = ReplicaRef("a", 1)
B = ReplicaRef("b", 1)


def position_of(tokens: Sequence[int]) -> Position:
    return RollingDigest.of(SALT, tokens).position()


def new_session(session_id: str = "ses_f", tenant: str = TENANT) -> NewSession:
    return NewSession(
        session_id=session_id,
        tenant=tenant,
        model="m",
        preamble=b"\x00preamble\xff",
        root_digest=EMPTY.digest,
        leading_digest=b"leading",
        labels=(("job", "a:b,c"), ("näme", "")),
    )


def spec(turn_id: str = "t1", timeout_ms: int = 60_000, digest: bytes = b"input") -> TurnSpec:
    return TurnSpec(turn_id, digest, b"body \x00 of " + turn_id.encode(), timeout_ms)


def nonce(ref: ReplicaRef, expected: Epoch) -> bytes:
    """Of the grant that follows ``expected``; another for each."""
    return f"{ref}/{expected.number}".encode()[-8:].rjust(8)


async def opened(store: SessionStore, session_id: str = "ses_f") -> Session:
    outcome = await store.open_session(new_session(session_id))
    assert isinstance(outcome, SessionWritten)
    return outcome.session


async def session_of(store: SessionStore, session_id: str) -> Session:
    """A session that has to be there."""
    session = await store.get_session(session_id)
    assert session is not None
    return session


class Owner:
    """Writes turns of one session. ``tokens`` are the whole ledger as this owner knows it."""

    def __init__(self, store: SessionStore, session_id: str, ref: ReplicaRef, epoch: Epoch) -> None:
        self.store = store
        self.session_id = session_id
        self.ref = ref
        self.epoch = epoch
        self.tokens: list[int] = []
        self.turn_id = ""

    @classmethod
    async def of(cls, store: SessionStore, session_id: str = "ses_f", ref: ReplicaRef = A) -> Owner:
        """Opens a session if need be and places it."""
        session = await store.get_session(session_id) or await opened(store, session_id)
        outcome = await store.place(session_id, session.epoch, ref, nonce(ref, session.epoch))
        assert isinstance(outcome, SessionWritten)
        owner = cls(store, session_id, ref, outcome.session.epoch)
        owner.tokens = await store.read_tokens(session, 0, session.head.length)
        return owner

    @property
    def head(self) -> Position:
        return position_of(self.tokens)

    async def begin(
        self, turn_id: str = "t1", tokens: Sequence[int] = (1, 2, 3), timeout_ms: int = 60_000
    ) -> BeginOutcome:
        outcome = await self.store.begin_turn(
            self.session_id,
            self.epoch,
            self.head,
            spec(turn_id, timeout_ms),
            tokens,
            position_of([*self.tokens, *tokens]),
            token_fingerprint=FINGERPRINT,
        )
        if isinstance(outcome, TurnBegun):
            self.tokens += tokens
            self.turn_id = turn_id
        return outcome

    async def begun(self, turn_id: str = "t1", tokens: Sequence[int] = (1, 2, 3)) -> Turn:
        outcome = await self.begin(turn_id, tokens)
        assert isinstance(outcome, TurnBegun)
        return outcome.turn

    def append(self, *tokens: int, commit: TurnResult | None = None) -> Append:
        """The next append; the owner counts it as done."""
        expected = self.head
        self.tokens += tokens
        return Append(
            self.session_id, self.epoch, self.turn_id, expected, tokens, self.head, commit
        )

    async def write(
        self, *tokens: int, commit: TurnResult | None = None
    ) -> AppendOutcome | StoreError:
        (outcome,) = await self.store.append_many([self.append(*tokens, commit=commit)])
        return outcome

    async def run_turn(self, turn_id: str, output: Sequence[int]) -> None:
        """A whole turn with three tokens of input."""
        await self.begun(turn_id)
        await self.write(*output, commit=STOP)

    def repair(
        self,
        observed: Position,
        observed_epoch: Epoch,
        *,
        keep: int,
        turns: Sequence[Turn] = (),
        active: str | None = None,
        turn_index: int = 0,
    ) -> Repair:
        """Writes back all tokens after the first ``keep``."""
        return Repair(
            session_id=self.session_id,
            epoch=self.epoch,
            owner=self.ref,
            observed_epoch=observed_epoch,
            observed=observed,
            keep=keep,
            tokens=self.tokens[keep:],
            head=self.head,
            turns=tuple(turns),
            active_turn_id=active,
            turn_index=turn_index,
            token_fingerprint=FINGERPRINT,
        )


async def taken(store: SessionStore, owner: Owner, nonce: bytes = b"taken") -> Owner:
    """B takes the session and knows its ledger."""
    outcome = await store.take(owner.session_id, owner.epoch, B, nonce)
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    successor = Owner(store, owner.session_id, B, session.epoch)
    successor.tokens = await store.read_tokens(session, 0, session.head.length)
    successor.turn_id = owner.turn_id
    return successor


async def known_turns(store: SessionStore, session_id: str = "ses_f") -> list[Turn]:
    return list(await store.get_turns(await session_of(store, session_id), 0, 100))


async def check_whole(store: SessionStore, owner: Owner) -> None:
    """The session is what the owner says."""
    session = await session_of(store, owner.session_id)
    assert session.owner == Ownership(owner.ref, owner.epoch)
    assert session.head == owner.head
    assert session.token_fingerprint == FINGERPRINT
    assert await store.read_tokens(session, 0, 1 << 30) == owner.tokens
