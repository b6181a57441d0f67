"""One move of a session: the pure machine of ``gateway/core/migration.py``, its actions carried out
on the real store, against a source and a target that are little more than numbers, while turns run,
owners change, sessions close and copies fail.

What must hold, whatever happens: ownership passes only by the switch, only to a target that has the
pages of the whole ledger (unless a recompute was allowed), and with a turn only while that stands
still; a move that fails leaves the session with its owner; every move ends within its rounds; and
whoever owns the session afterwards runs its next turn (I5, I6, P12)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.core.machines import MIGRATION, MigrationPhase
from gateway.core.migration import (
    Abort,
    Action,
    Began,
    Begin,
    Event,
    Failed,
    Finish,
    HeadMoved,
    Held,
    HoldTurn,
    Import,
    Imported,
    ImportFailed,
    MigrationLimits,
    Move,
    Switch,
    Switched,
    advance,
    start,
)
from loadtest.simulation.redis import LuaExecutor
from statestore.ports import (
    Appended,
    EpochLost,
    HeadMismatch,
    SessionWritten,
    TurnBegun,
    TurnResumed,
)
from statestore.records import ReplicaRef, Session, SessionState, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.nightly import examples
from tests.support.owners import STOP, A, Owner, position_of

T = TypeVar("T")
SESSION_ID = "ses_f"
TARGET = ReplicaRef("target", 1)
PAGE = 4
LIMITS = MigrationLimits(max_rounds=4, hand_over_tokens=4)
MOST_ACTIONS = 3 * LIMITS.max_rounds + 4
"""Begin, the end, and for each round a copy, a hold and a switch that came too late."""
LEASE_MS = 1000
LEGAL = {
    "PLANNED": {"PLANNED", "COPYING", "SWITCHING", "ABORTED"},
    "COPYING": {"COPYING", "SWITCHING", "ABORTED"},
    "SWITCHING": {"COPYING", "DONE", "ABORTED"},
}


@dataclass
class Clock:
    us: int = 1_763_888_000_000_000

    def __call__(self) -> int:
        self.us += 1
        return self.us


def computed_pages(length: int) -> int:
    """Tokens of the whole pages that a source can have: the last token of a ledger was sampled and
    is computed with the next turn."""
    return max(length - 1, 0) // PAGE * PAGE


class MigrationMachine(RuleBasedStateMachine):
    """The source runs turns as long as it is not held; ``copied`` is what the target has."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.clock = Clock()
        self.store = RedisStore(LuaExecutor(self.clock))
        self.turns = itertools.count(1)
        self.nonces = itertools.count(1)
        self.source = self.run(Owner.of(self.store))
        self.turn_id: str | None = None
        self.held = False
        self.copied = 0
        self.copies: str = "well"
        self.disturbed = False
        """Somebody else took or closed the session."""
        self.switched = False
        self.actions = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def stored(self) -> Session:
        session = self.run(self.store.get_session(SESSION_ID))
        assert session is not None
        return session

    @property
    def tokens(self) -> list[int]:
        return self.source.tokens

    @property
    def over(self) -> bool:
        return MIGRATION.final(self.move.phase)

    @initialize(recompute=st.booleans(), history=st.integers(0, 3 * PAGE))
    def begin(self, recompute: bool, history: int) -> None:
        if history:
            self.run(self.source.run_turn("t0", range(history)))
        self.move = Move(SESSION_ID, A, TARGET, PAGE, allow_recompute=recompute)
        self.action: Action = start(self.move)

    # -- what goes on meanwhile ---------------------------------------------------------------

    @property
    def source_runs(self) -> bool:
        return not self.disturbed and not self.switched and not self.held

    @rule()
    @precondition(lambda self: self.source_runs and self.turn_id is None)
    def a_turn_begins(self) -> None:
        turn_id = f"t{next(self.turns)}"
        assert isinstance(self.run(self.source.begin(turn_id)), TurnBegun)
        self.turn_id = turn_id

    @rule(count=st.integers(1, 3 * PAGE), last=st.booleans())
    @precondition(lambda self: self.source_runs and self.turn_id is not None)
    def tokens_come(self, count: int, last: bool) -> None:
        commit = STOP if last else None
        written = self.run(self.source.write(*range(count), commit=commit))
        assert isinstance(written, Appended)
        if last:
            self.turn_id = None

    @rule()
    @precondition(lambda self: not self.disturbed and not self.switched and self.turn_id)
    def the_turn_is_cancelled(self) -> None:
        """Also one that is held."""
        assert self.turn_id is not None
        self.run(self.store.cancel_turn(SESSION_ID, self.turn_id))
        self.turn_id, self.held = None, False

    @rule(how=st.sampled_from(["well", "short", "not at all"]))
    def copies_go(self, how: str) -> None:
        self.copies = how

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: not self.disturbed and not self.switched)
    def the_owner_changes(self, number: int) -> None:
        if number == 0:
            session = self.stored()
            other = ReplicaRef("other", 1)
            self.run(self.store.take(SESSION_ID, session.epoch, other, self.nonce()))
            self.disturbed = True
        elif number == 1:
            self.run(self.store.close(SESSION_ID, None))
            self.disturbed = True

    @rule(number=st.integers(0, 5))
    def the_lease_ends(self, number: int) -> None:
        if number == 0:
            self.clock.us += 1000 * LEASE_MS
            self.held = False

    # -- the move -----------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: not self.over)
    def the_move_goes_on(self) -> None:
        self.one_action()

    def one_action(self) -> None:
        before, owner = self.move, self.stored().owner
        event = self.carry_out(self.action)
        self.move, self.action = advance(self.move, event, LIMITS)
        self.actions += 1
        assert self.move.phase.value in LEGAL[before.phase.value]
        assert self.actions <= MOST_ACTIONS, "the move goes on for ever"
        if not isinstance(event, Switched):
            assert self.stored().owner == owner, "only a switch passes ownership"
        match self.action:
            case Switch(head, active):
                assert active is None or self.move.held
                have = self.move.verified_tokens
                assert have >= computed_pages(head.length) or self.move.allow_recompute
            case Finish():
                assert self.switched
            case Abort():
                self.undo()

    def carry_out(self, action: Action) -> Event:
        match action:
            case Begin():
                return self.side_record()
            case Import(up_to):
                return self.copy(up_to.length)
            case HoldTurn():
                return self.hold()
            case Switch():
                return self.switch(action)
            case _:
                raise AssertionError(f"{action} is no action of a move under way")

    def side_record(self) -> Event:
        outcome = self.run(
            self.store.begin_migration(SESSION_ID, self.source.epoch, "m", TARGET, LEASE_MS)
        )
        if not isinstance(outcome, SessionWritten):
            return Failed("refused")
        return Began(outcome.session.head, outcome.session.active_turn_id)

    def copy(self, length: int) -> Event:
        if self.copies == "not at all":
            return ImportFailed("the copy broke")
        whole = computed_pages(length)
        self.copied = max(self.copied, whole if self.copies == "well" else min(whole, PAGE))
        session = self.stored()
        if session.epoch != self.source.epoch:
            return Failed("the owner changed")
        return Imported(
            min(self.copied, whole), whole, session.head, session.active_turn_id, "copied"
        )

    def hold(self) -> Event:
        session = self.stored()
        if session.epoch != self.source.epoch:
            return Failed("the owner changed")
        self.held = self.turn_id is not None
        return Held(session.head, self.turn_id)

    def switch(self, action: Switch) -> Event:
        before = self.stored()
        outcome = self.run(
            self.store.switch_migration(
                SESSION_ID, self.source.epoch, "m", action.head, action.active_turn_id, self.nonce()
            )
        )
        match outcome:
            case SessionWritten(session):
                assert session.owner is not None
                assert session.owner.replica == TARGET
                assert session.head == before.head == position_of(self.tokens)
                assert session.active_turn_id == before.active_turn_id == self.turn_id
                assert self.turn_id is None or self.held, "a turn was moved while it ran"
                whole = computed_pages(len(self.tokens))
                assert self.copied >= whole or self.move.allow_recompute, "pages were left behind"
                self.switched, self.source.epoch = True, session.epoch
                return Switched()
            case HeadMismatch():
                return HeadMoved(before.head, before.active_turn_id)
            case EpochLost():
                return Failed("the owner changed")
            case _:
                return Failed("the lease ended")

    def undo(self) -> None:
        """As a gateway does after an abort."""
        self.run(self.store.abort_migration(SESSION_ID, "m"))
        self.held = False
        session = self.stored()
        assert session.migration is None
        if not self.disturbed:
            assert session.owner is not None
            assert session.owner.replica == A

    # -- afterwards ---------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if hasattr(self, "move"):
                self.finish()
        finally:
            self.loop.close()

    def finish(self) -> None:
        """Nothing disturbs the move any more: it ends, and the session runs its next turn."""
        self.copies = "well"
        while not self.over:
            self.one_action()
        session = self.stored()
        if self.move.phase is MigrationPhase.DONE:
            assert self.switched
        if session.state is not SessionState.OPEN:
            return
        assert session.owner is not None
        owner = Owner(self.store, SESSION_ID, session.owner.replica, session.epoch)
        owner.tokens = self.run(self.store.read_tokens(session, 0, session.head.length))
        assert owner.tokens == self.tokens
        if session.active_turn_id is not None:
            self.go_on(owner, session.active_turn_id)
        assert isinstance(self.run(owner.begin("last")), TurnBegun)
        assert isinstance(self.run(owner.write(1, commit=STOP)), Appended)

    def go_on(self, owner: Owner, turn_id: str) -> None:
        moved = owner.ref != A
        if moved:
            outcome = self.run(self.store.resume_turn(SESSION_ID, owner.epoch, turn_id))
            assert isinstance(outcome, TurnResumed)
            assert outcome.turn.status is TurnStatus.RUNNING
        owner.turn_id = turn_id
        assert isinstance(self.run(owner.write(7, commit=STOP)), Appended)

    def nonce(self) -> bytes:
        return next(self.nonces).to_bytes(8, "big")


def test_a_move_ends_and_leaves_a_session_that_runs() -> None:
    run_state_machine_as_test(
        MigrationMachine,
        settings=settings(
            max_examples=examples(60),
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def walk(seed: int) -> MigrationPhase:
    """A move with something between any two of its actions: Hypothesis prefers short histories."""
    draw = random.Random(seed)
    machine = MigrationMachine()
    machine.begin(recompute=draw.random() < 0.3, history=draw.randrange(5 * PAGE))
    while not machine.over:
        machine.copies_go(draw.choice([*4 * ["well"], "short", "not at all"]))
        for _ in range(draw.randrange(3)):
            if machine.source_runs and machine.turn_id is None:
                machine.a_turn_begins()
            elif machine.source_runs and draw.random() < 0.8:
                machine.tokens_come(draw.randrange(1, 3 * PAGE), draw.random() < 0.2)
            elif machine.turn_id and not machine.disturbed and draw.random() < 0.5:
                machine.the_turn_is_cancelled()
        if not machine.disturbed and draw.random() < 0.1:
            machine.the_owner_changes(draw.randrange(10))
        machine.the_lease_ends(draw.randrange(20))
        machine.one_action()
    machine.teardown()
    return machine.move.phase


def test_moves_end_well_or_leave_things_as_they_were() -> None:
    ends = Counter(walk(seed) for seed in range(300))
    assert ends[MigrationPhase.DONE] > 40
    assert ends[MigrationPhase.ABORTED] > 50


def test_a_session_that_never_stands_still_stays_where_it_is() -> None:
    machine = MigrationMachine()
    machine.begin(recompute=False, history=2 * PAGE)
    while not machine.over:
        if isinstance(machine.action, Switch):
            if machine.turn_id is None:
                machine.a_turn_begins()
            else:
                machine.the_turn_is_cancelled()
        machine.one_action()
    assert machine.move.phase is MigrationPhase.ABORTED
    machine.teardown()
