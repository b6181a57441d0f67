"""The store against a plain model of it, under random use by present and former owners: with moves,
pauses, and losses of acknowledged writes, which their owner repairs at once, later or too late."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from statestore import keys
from statestore.ports import (
    Append,
    Appended,
    EpochLost,
    Fenced,
    HeadMismatch,
    Missing,
    Refused,
    Repair,
    SessionWritten,
    TurnBegun,
    TurnEnded,
    TurnExists,
    TurnInProgress,
    TurnResumed,
    TurnTombstoned,
    TurnUnknown,
)
from statestore.records import Epoch, ReplicaRef, SessionState, StoreLimits, Turn, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.nightly import examples
from tests.support.owners import FINGERPRINT, STOP, new_session, position_of, spec
from tests.support.stores import BACKENDS, Backend, SimulatedBackend, server_backend, store_on

T = TypeVar("T")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=3)
RARELY = st.sampled_from([False, False, False, True])
NUMBERS = st.integers(0, 15)
MAX_SESSIONS = 4
LIMITS = StoreLimits(max_segments=2, max_attempts_without_progress=2)


@dataclass
class TurnModel:
    turn_id: str
    start: int
    status: TurnStatus = TurnStatus.RUNNING
    end: int = 0
    attempt_from: int = 0
    stalled: int = 0
    planned: bool = False
    """It was handed over in a move, which is no failed attempt."""


@dataclass
class SessionModel:
    session_id: str
    epoch: Epoch
    tokens: list[int] = field(default_factory=list)
    turns: list[TurnModel] = field(default_factory=list)
    parent_id: str | None = None
    owned: bool = False
    former: list[Epoch] = field(default_factory=list)
    inherited: int = 0
    """Turns that are its ancestors': their ids are not ids of this session."""
    tombstones: set[str] = field(default_factory=set)
    last_append: Append | None = None
    suspended: bool = False
    move: str | None = None

    @property
    def active(self) -> TurnModel | None:
        return self.turns[-1] if self.turns and not self.turns[-1].status.ended else None

    @property
    def own_turns(self) -> list[TurnModel]:
        return self.turns[self.inherited :]

    @property
    def boundaries(self) -> list[int]:
        return [0] + [turn.end for turn in self.turns if turn.status.ended]

    @property
    def state(self) -> SessionState:
        return SessionState.SUSPENDED if self.suspended else SessionState.OPEN

    def granted(self, epoch: Epoch, *, owned: bool = True) -> None:
        assert epoch > self.epoch
        self.former.append(self.epoch)
        self.epoch, self.owned, self.move = epoch, owned, None

    def end(self, status: TurnStatus) -> None:
        self.turns[-1].status, self.turns[-1].end = status, len(self.tokens)


@dataclass
class Lost:
    """What the owner of a session knows that the store has forgotten."""

    model: SessionModel
    turns: tuple[Turn, ...]


class StoreMachine(RuleBasedStateMachine):
    backend: ClassVar[Callable[[], AbstractAsyncContextManager[Backend]]]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.resources = AsyncExitStack()
        server = type(self).backend
        self.server = self.run(self.resources.enter_async_context(server()))
        self.store: RedisStore = store_on(self.server, LIMITS)
        self.sessions: list[SessionModel] = []
        self.numbers = itertools.count()
        self.newest: dict[str, Epoch] = {}
        """Of each session, also after the store forgot it: no epoch is granted twice (P2)."""
        self.purged: list[SessionModel] = []
        self.saved: tuple[Any, list[SessionModel], list[SessionModel]] | None = None
        self.lost: list[Lost] = []
        self.open()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def pick(
        self, data: st.DataObject, wanted: Callable[[SessionModel], bool] = lambda session: True
    ) -> SessionModel:
        """Rather one as wanted: most moves mean little for most sessions."""
        candidates = [session for session in self.sessions if wanted(session)]
        return data.draw(st.sampled_from(candidates or self.sessions))

    def nonce(self) -> bytes:
        return next(self.numbers).to_bytes(8, "big")

    # -- sessions and owners ------------------------------------------------------------------

    @rule()
    @precondition(lambda self: len(self.sessions) < 2)
    def open(self) -> None:
        session_id = f"ses_f{next(self.numbers)}"
        outcome = self.run(self.store.open_session(new_session(session_id)))
        assert isinstance(outcome, SessionWritten)
        self.sessions.append(SessionModel(session_id, outcome.session.epoch))
        self.place(self.sessions[-1])

    @rule(data=st.data())
    @precondition(lambda self: len(self.sessions) < MAX_SESSIONS)
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        at = data.draw(st.none() | st.integers(0, len(parent.boundaries)))
        child_id = f"{parent.session_id.partition('.')[0]}.{next(self.numbers)}"
        outcome = self.run(self.store.fork(parent.session_id, child_id, at, ()))
        count = len(parent.boundaries) - 1 if at is None else at
        if count >= len(parent.boundaries):
            assert isinstance(outcome, HeadMismatch)
            return
        assert isinstance(outcome, SessionWritten)
        child = SessionModel(child_id, outcome.session.epoch, parent_id=parent.session_id)
        child.tokens = parent.tokens[: parent.boundaries[count]]
        child.turns = [
            TurnModel(turn.turn_id, turn.start, turn.status, turn.end)
            for turn in parent.turns[:count]
        ]
        child.inherited = count
        assert len(outcome.session.segments) <= LIMITS.max_segments
        self.sessions.append(child)
        self.place(child)

    def place(self, session: SessionModel) -> None:
        owner = ReplicaRef("r", next(self.numbers))
        work = self.store.place(session.session_id, session.epoch, owner, self.nonce())
        outcome = self.run(work)
        assert isinstance(outcome, SessionWritten)
        self.grant(session, outcome.session.epoch)

    def grant(self, session: SessionModel, epoch: Epoch, *, owned: bool = True) -> None:
        assert epoch > self.newest.get(session.session_id, session.epoch)
        self.newest[session.session_id] = epoch
        session.granted(epoch, owned=owned)

    @rule(data=st.data())
    @precondition(lambda self: len(self.sessions) > 2)
    def purge(self, data: st.DataObject) -> None:
        session = self.pick(data)
        assert isinstance(self.run(self.store.close(session.session_id, 0)), SessionWritten)
        assert self.run(self.store.get_session(session.session_id)) is None
        self.sessions.remove(session)
        self.purged.append(session)

    @rule(data=st.data(), purged=st.booleans())
    def repeat_what_made_it(self, data: st.DataObject, purged: bool) -> None:
        """Open or fork, as a client does that waits too long, or a network that repeats it."""
        session = data.draw(st.sampled_from((purged and self.purged) or self.sessions))
        session_id, parent_id = session.session_id, session.parent_id
        if parent_id is None:
            outcome: object = self.run(self.store.open_session(new_session(session_id)))
        else:
            outcome = self.run(self.store.fork(parent_id, session_id, None, ()))
        if parent_id is not None and all(it.session_id != parent_id for it in self.sessions):
            assert outcome == Missing()
        elif session not in self.sessions:
            assert outcome == Refused(SessionState.CLOSED)
        else:
            assert isinstance(outcome, SessionWritten)
            self.check(session)

    @rule(data=st.data(), take=st.booleans(), to_nobody=RARELY, late=RARELY)
    def change_owner(self, data: st.DataObject, take: bool, to_nobody: bool, late: bool) -> None:
        session = self.pick(data)
        expected = session.former[-1] if late and session.former else session.epoch
        owner = ReplicaRef("r", next(self.numbers))
        if take:
            to = None if to_nobody else owner
            outcome = self.run(self.store.take(session.session_id, expected, to, self.nonce()))
        else:
            outcome = self.run(self.store.place(session.session_id, expected, owner, self.nonce()))
        if session.suspended:
            assert outcome == Refused(SessionState.SUSPENDED)
            return
        if expected != session.epoch or (session.owned and not take):
            assert isinstance(outcome, EpochLost)
            assert outcome.session.epoch == session.epoch
            return
        assert isinstance(outcome, SessionWritten)
        self.grant(session, outcome.session.epoch, owned=not (take and to_nobody))
        if take and session.active:
            session.active.status = TurnStatus.INTERRUPTED

    @rule(data=st.data(), suspend=st.booleans())
    def pause(self, data: st.DataObject, suspend: bool) -> None:
        session = self.pick(data, lambda it: it.suspended or it.active is None)
        change = self.store.suspend if suspend else self.store.unsuspend
        outcome = self.run(change(session.session_id))
        if session.active and suspend:
            assert outcome == Refused(SessionState.OPEN, session.active.turn_id)
        else:
            assert isinstance(outcome, SessionWritten)
            if suspend != session.suspended:
                session.suspended, session.owned, session.move = suspend, False, None
        self.check(session)

    # -- moves --------------------------------------------------------------------------------

    @rule(data=st.data())
    def begin_move(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda it: it.owned)
        move, target = f"m{next(self.numbers)}", ReplicaRef("r", next(self.numbers))
        outcome = self.run(
            self.store.begin_migration(session.session_id, session.epoch, move, target, 600_000)
        )
        if session.suspended:
            assert isinstance(outcome, Refused)
        elif not session.owned:
            assert isinstance(outcome, EpochLost)
        elif session.move is not None:
            assert isinstance(outcome, Refused)
        else:
            assert isinstance(outcome, SessionWritten)
            session.move = move
        self.check(session)

    @rule(data=st.data(), stale=RARELY, elsewhere=RARELY, other_turn=RARELY)
    def switch(self, data: st.DataObject, stale: bool, elsewhere: bool, other_turn: bool) -> None:
        session = self.pick(data, lambda it: it.move is not None)
        active = session.active.turn_id if session.active else None
        verified = [*session.tokens, 1] if elsewhere else session.tokens
        epoch = session.former[-1] if stale and session.former else session.epoch
        outcome = self.run(
            self.store.switch_migration(
                session.session_id,
                epoch,
                session.move or "none",
                position_of(verified),
                "another" if other_turn else active,
                self.nonce(),
            )
        )
        if session.suspended:
            assert isinstance(outcome, Refused)
        elif epoch != session.epoch:
            assert isinstance(outcome, EpochLost)
        elif session.move is None or other_turn:
            assert isinstance(outcome, Refused)
        elif elsewhere:
            assert isinstance(outcome, HeadMismatch)
        else:
            assert isinstance(outcome, SessionWritten)
            self.grant(session, outcome.session.epoch)
            if session.active:
                session.active.status, session.active.planned = TurnStatus.INTERRUPTED, True
        self.check(session)

    @rule(data=st.data())
    def abort_move(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda it: it.move is not None)
        self.run(self.store.abort_migration(session.session_id, session.move or "none"))
        session.move = None
        self.check(session)

    # -- lost writes --------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        models = copy.deepcopy((self.sessions, self.purged))
        self.saved = self.run(self.server.save()), *models

    @rule()
    @precondition(lambda self: self.saved is not None)
    def lose_writes(self) -> None:
        """All since the save, as in a fail-over of the server. Owners keep what they know."""
        assert self.saved is not None
        self.lost = [
            Lost(session, self.run(self.own_turns(session)))
            for session in self.sessions
            if session.owned
        ]
        state, self.sessions, self.purged = self.saved
        self.run(self.server.roll_back(state))
        self.saved = None
        for session in self.sessions:
            self.check(session)

    @rule(data=st.data(), tokens=TOKENS.filter(len), fork=RARELY, soon=st.booleans())
    @precondition(lambda self: any(it.owned and it.active is not None for it in self.sessions))
    def lose_the_end_of_a_turn_and_cancel_it(
        self, data: st.DataObject, tokens: list[int], fork: bool, soon: bool
    ) -> None:
        session = self.pick(data, lambda it: it.owned and it.active is not None)
        assert session.active is not None
        self.save()
        head = position_of([*session.tokens, *tokens])
        append = Append(
            session.session_id,
            session.epoch,
            session.active.turn_id,
            position_of(session.tokens),
            tokens,
            head,
        )
        assert self.run(self.store.append_many([append])) == [Appended(head)]
        session.tokens = session.tokens + tokens
        session.active.status = TurnStatus.RUNNING
        self.lose_writes()
        (stored,) = (it for it in self.sessions if it.session_id == session.session_id)
        assert stored.active is not None
        outcome = self.run(self.store.cancel_turn(stored.session_id, stored.active.turn_id))
        assert isinstance(outcome, TurnEnded)
        stored.end(TurnStatus.CANCELLED)
        self.check(stored)
        if fork and len(self.sessions) < MAX_SESSIONS:
            self.fork(data)
        if soon:
            self.repair(data, late=False)

    @rule(data=st.data(), tokens=TOKENS, number=NUMBERS, commit=st.booleans())
    def lose_what_was_just_written(
        self, data: st.DataObject, tokens: list[int], number: int, commit: bool
    ) -> None:
        self.save()
        self.begin(data, tokens, number, stale=False, elsewhere=False)
        self.append(data, tokens, stale=False, commit=commit, elsewhere=False)
        self.lose_writes()

    async def own_turns(self, model: SessionModel) -> tuple[Turn, ...]:
        session = await self.store.get_session(model.session_id)
        assert session is not None
        return await self.store.get_turns(session, model.inherited, 100)

    @rule(data=st.data(), late=RARELY)
    @precondition(lambda self: self.lost)
    def repair(self, data: st.DataObject, late: bool) -> None:
        """By the owner before the loss; the store may have gone on otherwise meanwhile."""
        stored = {session.session_id: session.tokens for session in self.sessions}
        behind = [it for it in self.lost if stored.get(it.model.session_id) != it.model.tokens]
        ours = data.draw(st.sampled_from(behind or self.lost))
        session = next((s for s in self.sessions if s.session_id == ours.model.session_id), None)
        if session is None:
            return
        self.lost.remove(ours)
        model = ours.model
        same = zip(session.tokens, model.tokens, strict=False)
        keep = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same))
        active = model.active.turn_id if model.active else None
        seen = [*session.tokens, 1] if late else session.tokens
        outcome = self.run(
            self.store.repair(
                Repair(
                    session_id=model.session_id,
                    epoch=model.epoch,
                    owner=ReplicaRef("r", next(self.numbers)),
                    observed_epoch=session.epoch,
                    observed=position_of(seen),
                    keep=keep,
                    tokens=model.tokens[keep:],
                    head=position_of(model.tokens),
                    turns=ours.turns,
                    active_turn_id=active,
                    turn_index=len(model.boundaries) - 1,
                    token_fingerprint=FINGERPRINT,
                )
            )
        )
        there = (
            model.epoch == session.epoch
            and model.tokens == session.tokens
            and active == (session.active.turn_id if session.active else None)
            and len(model.boundaries) == len(session.boundaries)
        )
        if session.suspended:
            assert outcome == Refused(SessionState.SUSPENDED)
        elif session.epoch > model.epoch:
            assert isinstance(outcome, Fenced)
        elif there:
            assert isinstance(outcome, Appended)
        elif active and self.ended_at(session, active) == model.tokens:
            assert isinstance(outcome, TurnEnded)
        elif late:
            assert isinstance(outcome, HeadMismatch)
        elif isinstance(outcome, Appended):
            assert active is None or active not in session.tombstones
            self.repaired(session, model)
        elif isinstance(outcome, TurnEnded) and self.was_cancelled_before(session, model):
            model.end(TurnStatus.CANCELLED)
            self.repaired(session, model)
        elif (
            self.is_cut_short(session, model)
            and isinstance(outcome, TurnEnded)
            and (outcome.turn.output_end == position_of(model.tokens) or not self.forked(session))
        ):
            assert outcome.turn.output_end == position_of(model.tokens)
            assert outcome.turn.status is TurnStatus.CANCELLED
            model.end(TurnStatus.CANCELLED)
            self.repaired(session, model)
        else:
            # Somebody refers to what the store went on with, or a turn has ended otherwise.
            assert isinstance(outcome, Fenced | TurnEnded)
            assert (
                session.tokens != model.tokens[: len(session.tokens)]
                or [turn.turn_id for turn in session.turns]
                != [turn.turn_id for turn in model.turns[: len(session.turns)]]
                or any(
                    mine.status.ended and mine.status is not other.status
                    for mine, other in zip(session.turns, model.turns, strict=False)
                )
            )
        for each in self.sessions:
            self.check(each)

    @staticmethod
    def ended_at(session: SessionModel, turn_id: str) -> list[int] | None:
        """The ledger up to the end of a turn of the session's own, if it has ended."""
        for turn in session.own_turns:
            if turn.turn_id == turn_id and turn.status.ended:
                return session.tokens[: turn.end]
        return None

    @staticmethod
    def is_cut_short(session: SessionModel, model: SessionModel) -> bool:
        """Whether all that the store lost is the end of a turn that was cancelled since."""
        if not session.own_turns or len(session.turns) != len(model.turns):
            return False
        stored, ours = session.turns[-1], model.turns[-1]
        return (
            (stored.turn_id, stored.start) == (ours.turn_id, ours.start)
            and stored.status is TurnStatus.CANCELLED
            and session.tokens == model.tokens[: len(session.tokens)]
        )

    @staticmethod
    def was_cancelled_before(session: SessionModel, model: SessionModel) -> bool:
        """Whether a cancel came while the store had lost that the turn had begun."""
        ids = {turn.turn_id for turn in session.own_turns}
        return (
            model.active is not None
            and model.active.turn_id in session.tombstones
            and model.active.turn_id not in ids
        )

    def forked(self, session: SessionModel) -> bool:
        """Whether a fork may refer to the session's last turn."""
        made = [*self.sessions, *self.purged]
        return any(it.parent_id == session.session_id for it in made)

    @staticmethod
    def repaired(session: SessionModel, model: SessionModel) -> None:
        """The store has the owner's history again; cancels that it got meanwhile stay."""
        session.tokens, session.turns = model.tokens, model.turns
        session.former = [*model.former, session.epoch]
        session.epoch, session.owned, session.move = model.epoch, True, None
        session.last_append = None
        if session.active:
            turn = session.active
            turn.status, turn.planned = TurnStatus.RUNNING, False
            turn.attempt_from, turn.stalled = turn.start, 0

    # -- turns --------------------------------------------------------------------------------

    @rule(data=st.data(), tokens=TOKENS, number=NUMBERS, stale=RARELY, elsewhere=RARELY)
    def begin(
        self, data: st.DataObject, tokens: list[int], number: int, stale: bool, elsewhere: bool
    ) -> None:
        session = self.pick(data, lambda it: stale or (it.owned and it.active is None))
        turn_id = f"t{number}"
        epoch = session.former[-1] if stale and session.former else session.epoch
        head = session.tokens[:-1] if elsewhere else session.tokens
        outcome = self.run(
            self.store.begin_turn(
                session.session_id,
                epoch,
                position_of(head),
                spec(turn_id),
                tokens,
                position_of([*head, *tokens]),
                token_fingerprint=FINGERPRINT,
            )
        )
        known = next((turn for turn in session.own_turns if turn.turn_id == turn_id), None)
        if known is not None and known.status.ended:
            assert isinstance(outcome, TurnExists)
        elif session.suspended:
            assert outcome == Refused(SessionState.SUSPENDED)
        elif epoch != session.epoch or not session.owned:
            assert isinstance(outcome, Fenced)
        elif known is not None:
            assert isinstance(outcome, TurnExists)
        elif turn_id in session.tombstones:
            assert isinstance(outcome, TurnTombstoned)
        elif session.active is not None:
            assert outcome == TurnInProgress(session.active.turn_id)
        elif head != session.tokens:
            assert isinstance(outcome, HeadMismatch)
        else:
            assert isinstance(outcome, TurnBegun)
            session.tokens = session.tokens + tokens
            length = len(session.tokens)
            session.turns.append(TurnModel(turn_id, length, attempt_from=length))
        self.check(session)

    @rule(data=st.data(), tokens=TOKENS, stale=RARELY, commit=RARELY, elsewhere=RARELY)
    def append(
        self,
        data: st.DataObject,
        tokens: list[int],
        stale: bool,
        commit: bool,
        elsewhere: bool,
    ) -> None:
        session = self.pick(data, lambda it: stale or it.active is not None)
        turn = session.turns[-1] if session.own_turns else None
        head = [*session.tokens, 1] if elsewhere else session.tokens
        append = Append(
            session.session_id,
            session.former[-1] if stale and session.former else session.epoch,
            turn.turn_id if turn else "t0",
            position_of(head),
            tokens,
            position_of([*head, *tokens]),
            STOP if commit else None,
        )
        (outcome,) = self.run(self.store.append_many([append]))
        if append.epoch != session.epoch:
            assert isinstance(outcome, Fenced)
        elif turn is None:
            assert isinstance(outcome, TurnUnknown | HeadMismatch)
        elif turn.status.ended:
            done = (
                commit
                and turn.status is TurnStatus.COMMITTED
                and append.head == position_of(session.tokens[: turn.end])
            )
            assert isinstance(outcome, Appended if done else TurnEnded)
        elif head != session.tokens:
            assert isinstance(outcome, HeadMismatch)
        else:
            assert outcome == Appended(append.head)
            session.tokens = session.tokens + tokens
            turn.status = TurnStatus.RUNNING
            session.last_append = append
            if commit:
                session.end(TurnStatus.COMMITTED)
        self.check(session)

    @rule(data=st.data())
    def repeat_append(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda it: it.last_append is not None)
        append = session.last_append
        if (
            append is None
            or append.epoch != session.epoch
            or append.turn_id != session.turns[-1].turn_id
            or append.head.length != len(session.tokens)
            or (session.turns[-1].status.ended and append.commit is None)
        ):
            return
        assert self.run(self.store.append_many([append])) == [Appended(append.head)]
        self.check(session)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        session = self.pick(data, lambda it: it.owned and it.active is not None)
        turn = session.active
        if turn is None or not session.owned:
            return
        if len(session.tokens) > turn.attempt_from:
            turn.stalled = 0
        elif turn.status is TurnStatus.INTERRUPTED and not turn.planned:
            turn.stalled += 1
        outcome = self.run(self.store.resume_turn(session.session_id, session.epoch, turn.turn_id))
        if turn.stalled >= LIMITS.max_attempts_without_progress:
            assert isinstance(outcome, TurnEnded)
            session.end(TurnStatus.FAILED)
        else:
            assert isinstance(outcome, TurnResumed)
            assert outcome.session.head == position_of(session.tokens)
            turn.status, turn.attempt_from = TurnStatus.RUNNING, len(session.tokens)
            turn.planned = False
        self.check(session)

    @rule(data=st.data(), number=NUMBERS)
    def cancel(self, data: st.DataObject, number: int) -> None:
        session = self.pick(data)
        active = data.draw(RARELY) and session.active
        turn_id = active.turn_id if active else f"t{number}"
        outcome = self.run(self.store.cancel_turn(session.session_id, turn_id))
        if turn_id in {turn.turn_id for turn in session.own_turns}:
            assert isinstance(outcome, TurnEnded)
            if session.active and session.active.turn_id == turn_id:
                session.end(TurnStatus.CANCELLED)
        else:
            assert outcome == TurnUnknown()
            session.tombstones.add(turn_id)
        self.check(session)

    # -- what must hold -----------------------------------------------------------------------

    def check(self, model: SessionModel) -> None:
        session = self.run(self.store.get_session(model.session_id))
        assert session is not None
        assert session.head == position_of(model.tokens)
        assert session.epoch == model.epoch
        assert session.state is model.state
        found = session.migration.migration_id if session.migration else None
        assert found == model.move
        assert (session.owner is not None) == model.owned
        assert session.active_turn_id == (model.active.turn_id if model.active else None)
        assert session.turn_index == len(model.boundaries) - 1
        tokens = self.run(self.store.read_tokens(session, 0, len(model.tokens) + 1))
        assert tokens == model.tokens
        turns = self.run(self.store.get_turns(session, 0, 100))
        assert [(turn.spec.turn_id, turn.status, turn.output_start.length) for turn in turns] == [
            (turn.turn_id, turn.status, turn.start) for turn in model.turns
        ]
        for turn, known in zip(turns, model.turns, strict=True):
            end = known.end if known.status.ended else len(model.tokens)
            assert turn.output_end == position_of(model.tokens[:end])

    def teardown(self) -> None:
        try:
            for session in self.sessions:
                self.check(session)
            while self.sessions:
                gone = self.sessions.pop(next(self.numbers) % len(self.sessions))
                self.run(self.store.close(gone.session_id, 0))
                self.purged.append(gone)
                for session in self.sessions:
                    self.check(session)
            left = sorted(key for key in self.run(self.server.keys()) if "{f" in key)
            assert left == sorted({keys.refs_key(gone.session_id) for gone in self.purged})
            fields = {field for key in left for field in self.run(self.server.fields(key))}
            assert fields == {b"gone:" + gone.session_id.encode() for gone in self.purged}
        finally:
            self.run(self.resources.aclose())
            self.loop.close()


def run_machine(
    backend: Callable[[], AbstractAsyncContextManager[Backend]], max_examples: int
) -> None:
    class Machine(StoreMachine):
        pass

    Machine.backend = staticmethod(backend)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples(max_examples),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "lossy"])
def test_the_store_agrees_with_its_model(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "simulated":
        run_machine(lambda: nullcontext(SimulatedBackend()), max_examples=40)
        return
    url = request.getfixturevalue(f"{backend}_url")
    run_machine(lambda: server_backend(url), max_examples=10)
