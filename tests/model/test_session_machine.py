"""The session's and the turn's life cycles, three ways: the tables of ``gateway/core/machines.py``,
the store's scripts, and a model that knows neither. All three must agree after every call, by
present and former owners, before and after deadlines; and every transition must be taken."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.core.machines import SESSION, TURN, SessionEvent, SessionPhase, TurnEvent, TurnPhase
from loadtest.simulation.redis import LuaExecutor
from statestore.ports import (
    Append,
    Appended,
    EpochLost,
    Fenced,
    Refused,
    SessionWritten,
    TurnBegun,
    TurnEnded,
    TurnExists,
    TurnInProgress,
    TurnResumed,
    TurnTombstoned,
    TurnUnknown,
)
from statestore.records import Epoch, ReplicaRef, Session, SessionState, StoreLimits
from statestore.redis_store import RedisStore
from tests.support.nightly import examples
from tests.support.owners import FINGERPRINT, STOP, new_session, position_of, spec

T = TypeVar("T")
SESSION_ID = "ses_f"
SHORT_MS, LONG_MS = 50, 600_000
MAX_STALLED = 2
TIMEOUTS = st.sampled_from([SHORT_MS, SHORT_MS, LONG_MS])
RARELY = st.sampled_from([False] * 7 + [True])
NOT_SEEN = {
    # A turn that fails before it is begun leaves no trace; said twice, these two change nothing.
    (TurnPhase.ACCEPTED, TurnEvent.FAIL),
    (SessionPhase.SUSPENDED, SessionEvent.SUSPEND),
    (SessionPhase.CLOSED, SessionEvent.CLOSE),
}


@dataclass
class Clock:
    us: int = 1_763_888_000_000_000

    def __call__(self) -> int:
        self.us += 1
        return self.us


@dataclass
class Turn:
    """The active turn as the model has it."""

    turn_id: str
    deadline_ms: int
    interrupted: bool = False
    planned: bool = False
    attempt_from: int = 0
    stalled: int = 0


@dataclass
class Model:
    """What a session is, in its own words: open or not, whose, busy with what."""

    state: str = "open"
    owner: ReplicaRef | None = None
    epoch: Epoch | None = None
    former: list[Epoch] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    turn: Turn | None = None
    ended: dict[str, str] = field(default_factory=dict)
    tombstones: set[str] = field(default_factory=set)
    move: tuple[str, ReplicaRef, int] | None = None
    """Id, target, end of its lease in ms."""

    @property
    def phase(self) -> SessionPhase:
        if self.state == "open":
            return SessionPhase.UNPLACED if self.owner is None else SessionPhase.PLACED
        return SessionPhase.SUSPENDED if self.state == "suspended" else SessionPhase.CLOSED

    def end(self, how: str) -> None:
        assert self.turn is not None
        self.ended[self.turn.turn_id], self.turn = how, None


def phase_of(session: Session) -> SessionPhase:
    if session.state is SessionState.OPEN:
        return SessionPhase.UNPLACED if session.owner is None else SessionPhase.PLACED
    return SessionPhase(session.state.value)


class SessionMachine(RuleBasedStateMachine):
    reached: ClassVar[Counter[tuple[str, str]]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.clock = Clock()
        limits = StoreLimits(max_attempts_without_progress=MAX_STALLED)
        self.store = RedisStore(LuaExecutor(self.clock), limits=limits)
        self.numbers = itertools.count(1)
        self.model = Model()
        outcome = self.run(self.store.open_session(new_session(SESSION_ID)))
        assert isinstance(outcome, SessionWritten)
        self.session = outcome.session
        self.model.epoch = self.session.epoch

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def nonce(self) -> bytes:
        return next(self.numbers).to_bytes(8, "big")

    def ref(self) -> ReplicaRef:
        return ReplicaRef("r", next(self.numbers))

    def epoch(self, stale: bool) -> Epoch:
        """The epoch that a caller presents."""
        former = self.model.former
        return former[-1] if stale and former else self.session.epoch

    @property
    def due(self) -> bool:
        """The active turn's deadline has passed at the next call."""
        turn = self.model.turn
        return turn is not None and (self.clock.us + 1) // 1000 >= turn.deadline_ms

    @initialize(busy=st.booleans(), timeout=TIMEOUTS)
    def start(self, busy: bool, timeout: int) -> None:
        """Most of what can go wrong goes wrong with a turn under way."""
        if busy:
            self.place(stale=False)
            self.begin(stale=False, again=False, timeout=timeout)

    # -- ownership ----------------------------------------------------------------------------

    def give(self, owner: ReplicaRef | None) -> None:
        model, turn = self.model, self.model.turn
        if turn is not None:
            turn.interrupted = True
        model.former.append(self.session.epoch)
        model.owner, model.move = owner, None

    @rule(stale=RARELY)
    @precondition(lambda self: self.model.turn is None or self.model.owner is None)
    def place(self, stale: bool) -> None:
        model, owner, expected = self.model, self.ref(), self.epoch(stale)
        outcome = self.run(self.store.place(SESSION_ID, expected, owner, self.nonce()))
        if model.state != "open":
            assert isinstance(outcome, Refused)
            self.nothing_happened()
        elif model.owner is not None or expected != self.session.epoch:
            assert isinstance(outcome, EpochLost)
            self.nothing_happened()
        else:
            assert isinstance(outcome, SessionWritten)
            self.give(owner)
            self.happened(SessionEvent.PLACE, granted=True)

    @rule(stale=RARELY, to_nobody=RARELY)
    def take(self, stale: bool, to_nobody: bool) -> None:
        model, expected = self.model, self.epoch(stale)
        owner = None if to_nobody else self.ref()
        due = self.due
        outcome = self.run(self.store.take(SESSION_ID, expected, owner, self.nonce()))
        if model.state != "open":
            assert isinstance(outcome, Refused)
            self.nothing_happened()
            return
        if expected != self.session.epoch:
            assert isinstance(outcome, EpochLost)
            self.nothing_happened()
            return
        assert isinstance(outcome, SessionWritten)
        turn = TurnEvent.OWNER_LOST if model.turn is not None else None
        if due:
            model.end("FAILED")
            turn = TurnEvent.FAIL
        event: SessionEvent | None = SessionEvent.TAKE if owner else SessionEvent.UNPLACE
        if model.owner is None:
            event = SessionEvent.PLACE if owner else None
        self.give(owner)
        self.happened(event, turn, granted=True)

    @rule(lease=st.sampled_from([SHORT_MS, LONG_MS]))
    def begin_move(self, lease: int) -> None:
        model, target, name = self.model, self.ref(), f"m{next(self.numbers)}"
        now_ms = (self.clock.us + 1) // 1000
        outcome = self.run(
            self.store.begin_migration(SESSION_ID, self.session.epoch, name, target, lease)
        )
        if model.state != "open" or (model.owner and model.move and model.move[2] > now_ms):
            assert isinstance(outcome, Refused)
            self.nothing_happened()
        elif model.owner is None:
            assert isinstance(outcome, EpochLost)
            self.nothing_happened()
        else:
            assert isinstance(outcome, SessionWritten)
            model.move = (name, target, now_ms + lease)
            self.happened(None)

    @rule(elsewhere=RARELY, forgets_turn=RARELY)
    @precondition(lambda self: self.model.move is not None)
    def switch(self, elsewhere: bool, forgets_turn: bool) -> None:
        model = self.model
        assert model.move is not None
        name, target, until_ms = model.move
        now_ms, due = (self.clock.us + 1) // 1000, self.due
        head = position_of([*model.tokens, 1] if elsewhere else model.tokens)
        active = model.turn.turn_id if model.turn and not forgets_turn else None
        outcome = self.run(
            self.store.switch_migration(
                SESSION_ID, self.session.epoch, name, head, active, self.nonce()
            )
        )
        turn = None
        if due:
            model.end("FAILED")
            turn = TurnEvent.FAIL
        matches = active == (model.turn.turn_id if model.turn else None)
        if until_ms > now_ms and matches and not elsewhere:
            assert isinstance(outcome, SessionWritten)
            if model.turn is not None:
                model.turn.planned = True
                turn = TurnEvent.OWNER_LOST
            self.give(target)
            self.happened(SessionEvent.TAKE, turn, granted=True)
        else:
            assert not isinstance(outcome, SessionWritten)
            self.happened(None, turn) if due else self.nothing_happened()

    @rule()
    @precondition(lambda self: self.model.move is not None)
    def abort_move(self) -> None:
        assert self.model.move is not None
        self.run(self.store.abort_migration(SESSION_ID, self.model.move[0]))
        self.model.move = None
        self.happened(None)

    # -- suspend and close --------------------------------------------------------------------

    @rule(number=st.integers(0, 1))
    def suspend(self, number: int) -> None:
        model, due = self.model, self.due
        if number and model.turn is None:
            return
        outcome = self.run(self.store.suspend(SESSION_ID))
        if model.state == "closed":
            assert isinstance(outcome, Refused)
            self.nothing_happened()
        elif model.state == "suspended":
            assert isinstance(outcome, SessionWritten)
            self.nothing_happened()
        elif model.turn is not None and not due:
            assert outcome == Refused(SessionState.OPEN, model.turn.turn_id)
            self.nothing_happened()
        else:
            assert isinstance(outcome, SessionWritten)
            if due:
                model.end("FAILED")
            if model.owner is not None:
                model.former.append(self.session.epoch)
            model.state, model.owner, model.move = "suspended", None, None
            self.happened(SessionEvent.SUSPEND, TurnEvent.FAIL if due else None)

    @rule()
    def resume_session(self) -> None:
        before = self.model.state
        outcome = self.run(self.store.unsuspend(SESSION_ID))
        assert isinstance(outcome, Refused if before == "closed" else SessionWritten)
        if before == "suspended":
            self.model.state = "open"
            self.happened(SessionEvent.RESUME)
        else:
            self.nothing_happened()

    @rule(number=st.integers(0, 2))
    @precondition(lambda self: self.model.ended or self.model.state == "suspended")
    def close(self, number: int) -> None:
        if number and self.model.state != "closed":
            return  # rarely: little can happen afterwards
        model, due = self.model, self.due
        outcome = self.run(self.store.close(SESSION_ID, None))
        assert isinstance(outcome, SessionWritten)
        if model.state == "closed":
            self.nothing_happened()
            return
        turn = None
        if model.turn is not None:
            turn = TurnEvent.FAIL if due else TurnEvent.CANCEL
            model.end("FAILED" if due else "CANCELLED")
        if model.owner is not None:
            model.former.append(self.session.epoch)
        model.state, model.owner, model.move = "closed", None, None
        self.happened(SessionEvent.CLOSE, turn)

    # -- turns --------------------------------------------------------------------------------

    @rule(stale=RARELY, again=RARELY, timeout=TIMEOUTS)
    def begin(self, stale: bool, again: bool, timeout: int) -> None:
        model, due = self.model, self.due
        known = [*model.tombstones, *model.ended]
        turn_id = sorted(known)[0] if again and known else f"t{next(self.numbers)}"
        tokens = [next(self.numbers)]
        epoch, now_ms = self.epoch(stale), (self.clock.us + 1) // 1000
        outcome = self.run(
            self.store.begin_turn(
                SESSION_ID,
                epoch,
                position_of(model.tokens),
                spec(turn_id, timeout),
                tokens,
                position_of([*model.tokens, *tokens]),
                token_fingerprint=FINGERPRINT,
            )
        )
        if turn_id in model.ended:
            assert isinstance(outcome, TurnExists)
            self.nothing_happened()
        elif model.state != "open":
            assert isinstance(outcome, Refused)
            self.nothing_happened()
        elif model.owner is None or epoch != self.session.epoch:
            assert isinstance(outcome, Fenced)
            self.nothing_happened()
        elif turn_id in model.tombstones:
            assert isinstance(outcome, TurnTombstoned)
            self.nothing_happened()
        elif model.turn is not None:
            assert outcome == TurnInProgress(model.turn.turn_id)
            if due:
                model.end("FAILED")
                self.happened(None, TurnEvent.FAIL)
            else:
                self.nothing_happened()
        else:
            assert isinstance(outcome, TurnBegun)
            model.tokens += tokens
            model.turn = Turn(turn_id, now_ms + timeout, attempt_from=len(model.tokens))
            self.happened(None, TurnEvent.BEGIN, before=TurnPhase.ACCEPTED)

    @rule(stale=RARELY, commit=st.booleans())
    @precondition(lambda self: self.model.turn is not None or self.model.ended)
    def append(self, stale: bool, commit: bool) -> None:
        model, due = self.model, self.due
        stale = stale or model.owner is None
        turn_id = model.turn.turn_id if model.turn else sorted(model.ended)[-1]
        epoch, tokens = self.epoch(stale), [next(self.numbers)]
        append = Append(
            SESSION_ID,
            epoch,
            turn_id,
            position_of(model.tokens),
            tokens,
            position_of([*model.tokens, *tokens]),
            STOP if commit else None,
        )
        (outcome,) = self.run(self.store.append_many([append]))
        if epoch != self.session.epoch:
            assert isinstance(outcome, Fenced)
            self.nothing_happened()
        elif model.turn is None:
            assert isinstance(outcome, TurnEnded)
            self.nothing_happened()
        elif due:
            assert isinstance(outcome, TurnEnded)
            model.end("FAILED")
            self.happened(None, TurnEvent.FAIL)
        else:
            assert isinstance(outcome, Appended)
            event = TurnEvent.RESUME if model.turn.interrupted else None
            model.tokens += tokens
            model.turn.interrupted = False
            if commit:
                # An owner that appends to an interrupted turn resumes it with the same write.
                self.last_phase, event = TurnPhase.RUNNING, TurnEvent.COMMIT
                model.end("COMMITTED")
            self.happened(None, event)

    @rule(stale=RARELY)
    @precondition(lambda self: self.model.turn is not None)
    def resume(self, stale: bool) -> None:
        model, due = self.model, self.due
        assert model.turn is not None
        turn, epoch = model.turn, self.epoch(stale)
        outcome = self.run(self.store.resume_turn(SESSION_ID, epoch, turn.turn_id))
        if due:
            assert isinstance(outcome, TurnEnded)
            model.end("FAILED")
            self.happened(None, TurnEvent.FAIL)
            return
        if model.owner is None or epoch != self.session.epoch:
            assert isinstance(outcome, Fenced)
            self.nothing_happened()
            return
        if len(model.tokens) > turn.attempt_from:
            turn.stalled = 0
        elif turn.interrupted and not turn.planned:
            turn.stalled += 1
        if turn.stalled >= MAX_STALLED:
            assert isinstance(outcome, TurnEnded)
            model.end("FAILED")
            self.happened(None, TurnEvent.FAIL)
            return
        assert isinstance(outcome, TurnResumed)
        turn.interrupted = turn.planned = False
        turn.attempt_from = len(model.tokens)
        self.happened(None, TurnEvent.RESUME)

    @rule(unknown=RARELY)
    @precondition(lambda self: self.model.turn is not None or len(self.model.tombstones) < 2)
    def cancel(self, unknown: bool) -> None:
        model, due = self.model, self.due
        turn_id = f"t{next(self.numbers)}"
        if model.turn is not None and not unknown:
            turn_id = model.turn.turn_id
        outcome = self.run(self.store.cancel_turn(SESSION_ID, turn_id))
        if model.turn is None or turn_id != model.turn.turn_id:
            assert outcome == TurnUnknown()
            if model.state == "closed":
                self.nothing_happened()
            else:
                model.tombstones.add(turn_id)
                self.happened(None)
                self.reach(TurnPhase.ACCEPTED, TurnEvent.CANCEL)
            return
        assert isinstance(outcome, TurnEnded)
        model.end("FAILED" if due else "CANCELLED")
        self.happened(None, TurnEvent.FAIL if due else TurnEvent.CANCEL)

    @rule()
    def sweep(self) -> None:
        self.clock.us += 2000  # a session noted again while it is due is looked at a little later
        due = self.due
        self.run(self.store.sweep(10))
        if due:
            self.model.end("FAILED")
            self.happened(None, TurnEvent.FAIL)
        else:
            self.nothing_happened()

    @rule(ms=st.sampled_from([1, SHORT_MS]))
    @precondition(lambda self: self.model.turn is not None or self.model.move is not None)
    def pass_time(self, ms: int) -> None:
        self.clock.us += 1000 * ms

    # -- the three agree ----------------------------------------------------------------------

    def stored(self) -> Session:
        session = self.run(self.store.get_session(SESSION_ID))
        assert session is not None
        return session

    def status(self, turn_id: str) -> str:
        turn = self.run(self.store.get_turn(SESSION_ID, turn_id))
        assert turn is not None
        return turn.status.value

    def nothing_happened(self) -> None:
        assert self.stored().version == self.session.version

    def happened(
        self,
        event: SessionEvent | None,
        turn_event: TurnEvent | None = None,
        *,
        granted: bool = False,
        before: TurnPhase | None = None,
    ) -> None:
        model, was, now = self.model, self.session, self.stored()
        assert now.version > was.version
        assert phase_of(now) == model.phase
        if event is None:
            assert phase_of(now) == phase_of(was)
        else:
            assert SESSION.step(phase_of(was), event) == phase_of(now)
            self.reach(phase_of(was), event)
        assert (now.epoch > was.epoch) if granted else (now.epoch == was.epoch)
        assert (None if now.owner is None else now.owner.replica) == model.owner
        assert now.head == position_of(model.tokens)
        assert now.active_turn_id == (model.turn.turn_id if model.turn else None)
        assert now.turn_index == len(model.ended)
        self.turn_agrees(turn_event, before)
        self.session = now

    def turn_agrees(self, event: TurnEvent | None, before: TurnPhase | None) -> None:
        model = self.model
        turn_id = model.turn.turn_id if model.turn else next(reversed(model.ended), None)
        if turn_id is None:
            return
        status = self.status(turn_id)
        if model.turn is not None:
            assert status == ("INTERRUPTED" if model.turn.interrupted else "RUNNING")
        else:
            assert status == model.ended[turn_id]
        if event is not None:
            before = before or self.last_phase
            assert TURN.step(before, event) == status
            self.reach(before, event)
        self.last_phase = TurnPhase(status)

    last_phase = TurnPhase.ACCEPTED

    def reach(self, state: str, event: str) -> None:
        self.reached[(state, event)] += 1

    def teardown(self) -> None:
        for turn_id, how in self.model.ended.items():
            assert self.status(turn_id) == how, "a turn that has ended stays as it ended"
        self.loop.close()


def test_store_tables_and_model_agree() -> None:
    run_state_machine_as_test(
        SessionMachine,
        settings=settings(
            max_examples=examples(40),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def walk(seed: int, steps: int) -> None:
    """A long random walk over the same rules: Hypothesis prefers short ones."""
    draw = random.Random(seed)
    machine = SessionMachine()

    def rarely() -> bool:
        return draw.random() < 0.15

    for _ in range(steps):
        model = machine.model
        moves: list[Callable[[], None]] = [
            lambda: machine.place(rarely()),
            lambda: machine.take(rarely(), rarely()),
            lambda: machine.begin_move(draw.choice([SHORT_MS, LONG_MS])),
            lambda: machine.suspend(draw.randrange(3)),
            machine.resume_session,
            lambda: machine.begin(rarely(), rarely(), draw.choice([SHORT_MS, LONG_MS])),
            machine.sweep,
        ]
        if model.move is not None:
            moves += [lambda: machine.switch(rarely(), rarely()), machine.abort_move]
        if model.turn is not None:
            moves += 2 * [lambda: machine.append(rarely(), rarely())]
            moves += 2 * [lambda: machine.resume(rarely())]
            moves += [lambda: machine.cancel(rarely())]
            moves += [lambda: machine.pass_time(draw.choice([1, SHORT_MS]))]
        if model.ended or model.state == "suspended":
            moves += [lambda: machine.close(draw.randrange(8))]
        if model.turn is None and len(model.tombstones) < 2:
            moves += [lambda: machine.cancel(True)]
        draw.choice(moves)()
    machine.teardown()


def test_every_transition_is_taken_and_agreed_on() -> None:
    SessionMachine.reached.clear()
    for seed in range(40):
        walk(seed, steps=120)
    edges: set[tuple[str, str]] = {(s, e) for s, row in SESSION.table.items() for e in row}
    edges |= {(s, e) for s, row in TURN.table.items() for e in row}
    assert edges - NOT_SEEN == set(SessionMachine.reached)
