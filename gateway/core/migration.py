"""Moving sessions, as pure decisions: which go where and in which order, and the next action of
one move from its state. No I/O happens here: events come in, actions go out as data.

One move: copy, verify, then switch. The target pulls KV pages in rounds while the source still owns
(and runs) the session; a running turn is held at a step boundary only for the last round; then
ownership passes by compare-and-set. Pre-copy after Clark et al., "Live migration of virtual
machines" (NSDI 2005). A failure at any point before the switch leaves the owner as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.core.fleet import FleetSnapshot, Replica
from gateway.core.machines import (
    MIGRATION,
    Illegal,
    MigrationEvent,
    MigrationPhase,
    ReplicaState,
)
from gateway.core.placement import (
    Decision,
    Holder,
    NoCandidate,
    PlacementModel,
    PlacementRequest,
    place,
)
from statestore.records import Position, ReplicaRef, Session

NOWHERE = Position(0, b"")
"""Head of a move that has not read its session yet."""


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """Bounds of one move."""

    max_rounds: int = 6
    """Copy rounds at most, the final one included."""
    hand_over_tokens: int = 256
    """A running turn is held once the target is at most this far behind."""
    hold_s: float = 2.0
    """A held turn goes on where it was this long after its mover was last heard of."""

    def __post_init__(self) -> None:
        if self.max_rounds < 2 or self.hand_over_tokens < 1 or self.hold_s <= 0:
            raise ValueError("need max_rounds >= 2, hand_over_tokens >= 1 and hold_s > 0")


@dataclass(frozen=True, slots=True)
class Move:
    """The state of one move. ``head`` is the ledger's end as last seen; ``verified_tokens`` what
    the target holds and has verified; ``held`` says that nothing runs at ``head``."""

    session_id: str
    source: ReplicaRef
    target: ReplicaRef
    page_size: int
    allow_recompute: bool = False
    phase: MigrationPhase = MigrationPhase.PLANNED
    head: Position = NOWHERE
    active_turn_id: str | None = None
    held: bool = False
    rounds: int = 0
    verified_tokens: int = 0
    bytes_copied: int = 0
    detail: str = ""


# -- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Began:
    """The side record is written; the session as it was then."""

    head: Position
    active_turn_id: str | None


@dataclass(frozen=True, slots=True)
class Imported:
    """A copy round ended. ``head`` and ``active_turn_id`` were read after it."""

    verified_tokens: int
    bytes_copied: int
    head: Position
    active_turn_id: str | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """A copy round broke (source or target does not answer, pages refused)."""

    why: str


@dataclass(frozen=True, slots=True)
class Held:
    """The source holds its turn at ``head``; ``turn_id`` is None if it had ended by then."""

    head: Position
    turn_id: str | None


@dataclass(frozen=True, slots=True)
class Switched:
    """Ownership passed to the target."""


@dataclass(frozen=True, slots=True)
class HeadMoved:
    """The switch was refused because the ledger or its active turn changed meanwhile."""

    head: Position
    active_turn_id: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """Anything else: the owner changed, the session closed, the store refused, time ran out."""

    why: str


Event = Began | Imported | ImportFailed | Held | Switched | HeadMoved | Failed


# -- actions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Write the side record."""


@dataclass(frozen=True, slots=True)
class Import:
    """Have the target pull and verify up to here."""

    up_to: Position


@dataclass(frozen=True, slots=True)
class HoldTurn:
    """Have the source hold its turn at a step boundary."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Compare-and-set the owner at exactly this head and active turn."""

    head: Position
    active_turn_id: str | None


@dataclass(frozen=True, slots=True)
class Finish:
    """Release the source; wake a held turn on the target."""

    resume_turn_id: str | None


@dataclass(frozen=True, slots=True)
class Abort:
    """Undo: delete the side record, let a turn go on if one was held, free the target's pages."""

    why: str


Action = Begin | Import | HoldTurn | Switch | Finish | Abort


def start(move: Move) -> Action:
    """The first action of a move that is PLANNED."""
    if move.phase is not MigrationPhase.PLANNED:
        raise ValueError(f"a move that is {move.phase} was started already")
    return Begin()


def advance(move: Move, event: Event, limits: MigrationLimits) -> tuple[Move, Action]:
    """The state after an event, and what to do next. An event that the phase cannot take aborts
    the move; final phases take none (ValueError)."""
    if MIGRATION.final(move.phase):
        raise ValueError(f"the move of {move.session_id} is {move.phase}")
    match event:
        case Began(head, turn_id):
            moved = replace(move, head=head, active_turn_id=turn_id)
            return _to(moved, MigrationEvent.BEGUN, _first_copy(moved))
        case Imported():
            return _after_import(_count(move, event), event.head, event.active_turn_id, limits)
        case ImportFailed(why):
            if not move.allow_recompute:
                return _abort(move, why)
            moved = replace(move, detail=f"without KV: {why}", rounds=limits.max_rounds)
            return _ready(moved)
        case Held(head, turn_id):
            moved = replace(move, head=head, active_turn_id=turn_id, held=True)
            return _to(moved, MigrationEvent.COPIED, Import(head))
        case HeadMoved(head, turn_id):
            return _after_head_moved(move, head, turn_id, limits)
        case Switched():
            return _to(move, MigrationEvent.SWITCHED, Finish(move.active_turn_id))
        case Failed(why):
            return _abort(move, why)


def _first_copy(move: Move) -> Action:
    if not _lacks_pages(move, move.head):
        return Switch(move.head, move.active_turn_id) if not move.active_turn_id else HoldTurn()
    return Import(move.head)


def _lacks_pages(move: Move, head: Position) -> bool:
    """The target lacks pages that the source can have. A ledger's last token was sampled and not
    computed since: a page that ends with it is whole nowhere."""
    return head.length - 1 - move.verified_tokens >= move.page_size


def _count(move: Move, event: Imported) -> Move:
    return replace(
        move,
        rounds=move.rounds + 1,
        verified_tokens=event.verified_tokens,
        bytes_copied=move.bytes_copied + event.bytes_copied,
        detail=event.detail,
    )


def _after_import(
    move: Move, head: Position, turn_id: str | None, limits: MigrationLimits
) -> tuple[Move, Action]:
    asked = move.head
    complete = not _lacks_pages(move, asked)
    if not complete and move.rounds >= limits.max_rounds and not move.allow_recompute:
        return _abort(move, f"only {move.verified_tokens} of {asked.length} tokens arrived")
    if move.held:
        if not complete and not move.allow_recompute:
            return _abort(move, move.detail or "the final round left a gap")
        return _ready(move)
    grown = replace(move, head=head, active_turn_id=turn_id)
    behind = head.length - move.verified_tokens
    last = move.rounds >= limits.max_rounds - 1
    if turn_id is not None:
        if behind <= max(limits.hand_over_tokens, move.page_size) or last:
            return _to(grown, MigrationEvent.COPIED, HoldTurn())
        return _to(grown, MigrationEvent.COPIED, Import(head))
    lacking = _lacks_pages(move, head)
    if lacking and not last:
        return _to(grown, MigrationEvent.COPIED, Import(head))
    if lacking and not move.allow_recompute:
        return _abort(move, move.detail or f"the target is {behind} tokens behind")
    return _ready(grown)


def _after_head_moved(
    move: Move, head: Position, turn_id: str | None, limits: MigrationLimits
) -> tuple[Move, Action]:
    # A turn began (or a held one was ended by a cancel) between the copy and the switch.
    if move.rounds >= limits.max_rounds:
        return _abort(move, "the session never stood still")
    moved = replace(move, head=head, active_turn_id=turn_id, held=False, rounds=move.rounds + 1)
    action: Action = Import(head) if head.length > move.page_size else HoldTurn()
    return _to(moved, MigrationEvent.BEHIND, action)


def _ready(move: Move) -> tuple[Move, Action]:
    if move.active_turn_id is not None and not move.held:
        return _to(move, MigrationEvent.COPIED, HoldTurn())
    return _to(move, MigrationEvent.READY, Switch(move.head, move.active_turn_id))


def _abort(move: Move, why: str) -> tuple[Move, Action]:
    return replace(move, phase=MigrationPhase.ABORTED, detail=why), Abort(why)


def _to(move: Move, event: MigrationEvent, action: Action) -> tuple[Move, Action]:
    if isinstance(action, Switch) and event is not MigrationEvent.READY:
        # A session without a whole page has nothing to copy: it is ready as soon as it is begun.
        begun = MIGRATION.step(move.phase, event)
        if isinstance(begun, Illegal):
            return _abort(move, f"{event} while {move.phase}")
        return _to(replace(move, phase=begun), MigrationEvent.READY, action)
    after = MIGRATION.step(move.phase, event)
    if isinstance(after, Illegal):
        return _abort(move, f"{event} while {move.phase}")
    return replace(move, phase=after), action


# -- drains ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """Move this session there."""

    session_id: str
    target: ReplicaRef
    running: bool


@dataclass(frozen=True, slots=True)
class Stays:
    """Nobody can take this session."""

    session_id: str
    why: str


def plan_drain(
    sessions: Sequence[Session], source: ReplicaRef, fleet: FleetSnapshot, model: PlacementModel
) -> tuple[PlannedMove | Stays, ...]:
    """Where each session of a draining replica goes, in order: idle ones first (their moves cost
    nobody anything), short ledgers before long ones (most sessions are safe soonest), ties by id.
    Each planned move counts as load of its target for those after it."""
    ordered = sorted(
        (s for s in sessions if s.owner is not None and s.owner.replica == source),
        key=lambda s: (s.active_turn_id is not None, s.head.length, s.session_id),
    )
    planned: list[PlannedMove | Stays] = []
    for session in ordered:
        decision = place(fleet, move_request(session, source), model)
        if isinstance(decision, NoCandidate):
            planned.append(Stays(session.session_id, str(decision)))
            continue
        running = session.active_turn_id is not None
        planned.append(PlannedMove(session.session_id, decision.replica.ref, running))
        fleet = _assume(fleet, decision, running)
    return tuple(planned)


def has_no_target(source: Replica, fleet: FleetSnapshot) -> bool:
    """Whether no other replica could take sessions of ``source`` now or soon: all that serve its
    model with its tokenizer drain, or are DOWN. One that is full, late or new may yet take some."""
    own = source.details
    return all(
        replica.state in (ReplicaState.DRAINING, ReplicaState.DOWN)
        for replica in fleet.replicas
        if replica.ref != source.ref
        and replica.details.model == own.model
        and replica.details.token_fingerprint == own.token_fingerprint
    )


def move_request(session: Session, source: ReplicaRef) -> PlacementRequest:
    """Asks for the best replica other than the source, which holds the session's KV."""
    return PlacementRequest(
        session_id=session.session_id,
        model=session.model,
        history_tokens=session.head.length,
        leading_digest=session.leading_digest.hex(),
        token_fingerprint=session.token_fingerprint.hex(),
        holders=(Holder(source, session.head.length),),
        exclude={source: "is where the session is"},
    )


def _assume(fleet: FleetSnapshot, decision: Decision, running: bool) -> FleetSnapshot:
    def loaded(replica: Replica) -> Replica:
        if replica.ref != decision.replica.ref:
            return replica
        assumed = replica.assumed
        return replace(
            replica,
            assumed=replace(
                assumed, sessions=assumed.sessions + 1, turns=assumed.turns + int(running)
            ),
        )

    return FleetSnapshot(tuple(loaded(r) for r in fleet.replicas))
