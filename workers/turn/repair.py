"""Putting back what the store lost (P1, P2).

A store that fails over may forget writes it had acknowledged. The owner still holds them, and its
clients have seen them; so the owner compares what the store has now with what it holds, keeps the
common prefix, and writes the rest again in one compare-and-set against what it observed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import anyio

from gateway.core.errors import DataLoss, Unavailable
from statestore.ports import Fenced, HeadMismatch, JournalPort, Repair, RepairOutcome
from statestore.records import Epoch, Position, ReplicaRef, Session, Turn, TurnStatus
from workers.journal import until_answered
from workers.residency import ResidentSession

MAX_TRIES = 4
"""Times a repair starts over because the store changed between look and write."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What this replica holds of a session, taken at one moment: a turn may begin and end here
    while a repair waits for the store, and its record without its tokens fits nowhere."""

    turns: tuple[Turn, ...]
    """The last that ended, then the active one."""
    active_turn_id: str | None
    end: Position
    turn_index: int

    @classmethod
    def of(cls, resident: ResidentSession, active: Turn | None) -> _Held:
        recent, end = tuple(resident.recent), resident.head
        if active is not None:
            turns = (*recent, replace(active, output_end=end))
            return cls(turns, active.spec.turn_id, end, resident.turn_index)
        # What was journalled of a turn that broke off here is in no record that could be put back.
        return cls(recent, None, recent[-1].output_end if recent else end, resident.turn_index)


def is_behind(session: Session, turn: Turn | None, resident: ResidentSession) -> bool:
    """Whether the store has less of the session than this replica wrote under its epoch. Can tell
    between turns, and in ``turn`` if its run broke off here."""
    if session.epoch > resident.epoch:
        return False
    if session.turn_index < resident.turn_index:
        return True
    idle = session.turn_index == resident.turn_index and session.active_turn_id is None
    shorter = session.head.length < len(resident.tokens)
    return shorter and (idle or broken_off(session, turn, resident) is not None)


def broken_off(session: Session, turn: Turn | None, resident: ResidentSession) -> Turn | None:
    """The session's last turn as far as this replica had it when its run broke off, if ``turn`` is
    that. The store may have ended it since."""
    if turn is None or turn.index != resident.turn_index:
        return None
    after = turn.index + 1 if turn.status.ended else turn.index
    active = None if turn.status.ended else turn.spec.turn_id
    if (session.turn_index, session.active_turn_id) != (after, active):
        return None
    return replace(turn, status=TurnStatus.RUNNING, output_end=resident.head, result=None)


async def repair(
    store: JournalPort,
    resident: ResidentSession,
    owner: ReplicaRef,
    epoch: Epoch,
    active: Turn | None,
    give_up_at: float,
    *,
    token_fingerprint: bytes,
    unasked: bool = False,
) -> RepairOutcome:
    """Makes the ledger what ``resident`` holds, with ``active`` as the running turn.

    ``token_fingerprint``: this replica's, for what it holds as the owner are tokens of its own.

    ``unasked``: nobody wants this history rather than the store's. Then it is HeadMismatch if
    the store has anything that would be given up for it: somebody went on from what was left.

    ``resident`` is untouched. Raises DataLoss if it does not reach back far enough to close the
    gap, or if the store has more than it of the same history; Unavailable if the store kept
    changing; and what the store raises past ``give_up_at`` (the loop's clock).
    """
    held = _Held.of(resident, active)
    for _ in range(MAX_TRIES):
        session = await until_answered(lambda: store.get_session(resident.session_id), give_up_at)
        if session is None:
            raise DataLoss(f"session {resident.session_id} is no longer in the store")
        if session.epoch.number > epoch.number or (
            session.epoch.number == epoch.number and session.epoch.nonce != epoch.nonce
        ):
            holder = session.owner.replica if session.owner else None
            twice = session.epoch.number == epoch.number
            return Fenced(session.epoch, holder, data_loss=twice)
        if session.epoch == epoch and session.head.length > len(resident.tokens):
            raise DataLoss(
                f"session {resident.session_id}: the store holds tokens of this replica's epoch "
                "that it never wrote"
            )
        request = await until_answered(
            partial(_request, store, session, resident, held, owner, epoch, token_fingerprint),
            give_up_at,
        )
        if unasked and not await _gives_up_nothing(store, session, held, request):
            return HeadMismatch(session.head, session.epoch)
        outcome = await until_answered(partial(store.repair, request), give_up_at)
        if not isinstance(outcome, HeadMismatch):
            return outcome
    raise Unavailable(f"session {resident.session_id}: its record keeps changing under a repair")


async def put_back_unasked(
    store: JournalPort,
    session: Session,
    resident: ResidentSession,
    owner: ReplicaRef,
    token_fingerprint: bytes,
) -> RepairOutcome | None:
    """Repairs a session that no turn runs of here if the store is behind what this replica holds as
    its owner; None if it is not. ``session`` is the record as read just now. Raises as
    :func:`repair` does, and what the store raises the first time that it does not answer."""
    if session.turn_index >= resident.turn_index and session.head.length >= len(resident.tokens):
        return None
    last = await store.get_turns(session, resident.turn_index, 1)
    turn = last[0] if last else None
    if not is_behind(session, turn, resident):
        return None
    held, now = broken_off(session, turn, resident), anyio.current_time()
    return await repair(
        store,
        resident,
        owner,
        resident.epoch,
        held,
        now,
        token_fingerprint=token_fingerprint,
        unasked=True,
    )


async def _gives_up_nothing(
    store: JournalPort, session: Session, held: _Held, request: Repair
) -> bool:
    """Whether the store's tokens and turns, ended or active, are all among ours."""
    first = held.turns[0].index if held.turns else held.turn_index
    stored = await store.get_turns(session, first, len(held.turns) + 1)
    ours = {turn.spec.turn_id for turn in held.turns}
    return request.keep == session.head.length and {t.spec.turn_id for t in stored} <= ours


async def _request(
    store: JournalPort,
    session: Session,
    resident: ResidentSession,
    held: _Held,
    owner: ReplicaRef,
    epoch: Epoch,
    token_fingerprint: bytes,
) -> Repair:
    keep = min(await _common_prefix(store, session, resident), held.end.length)
    first = held.turns[0] if held.turns else None
    if first is None or first.index > session.turn_index or first.input_start > keep:
        raise DataLoss(
            f"session {resident.session_id}: of the turns that the store lost, from token {keep} "
            f"or index {session.turn_index}, this replica holds "
            + (f"only those from index {first.index}" if first else "none")
        )
    # Ended turns are given if the store has another or none at their index, or if tokens of theirs
    # are to be written again: where it ended one otherwise (a cancel after the loss), that end
    # stands and the repair must not go on.
    stored = await store.get_turns(session, first.index, len(held.turns))
    known = {(turn.index, turn.spec.turn_id) for turn in stored if turn.status.ended}
    turns = [
        turn
        for turn in held.turns
        if turn.spec.turn_id == held.active_turn_id
        or (turn.index, turn.spec.turn_id) not in known
        or turn.output_end.length > keep
    ]
    return Repair(
        session_id=resident.session_id,
        epoch=epoch,
        owner=owner,
        observed_epoch=session.epoch,
        observed=session.head,
        keep=keep,
        tokens=resident.tokens[keep : held.end.length],
        head=held.end,
        turns=tuple(turns),
        active_turn_id=held.active_turn_id,
        turn_index=held.turn_index,
        token_fingerprint=token_fingerprint,
    )


async def _common_prefix(store: JournalPort, session: Session, resident: ResidentSession) -> int:
    """Tokens that the store's ledger and ours have in common, from the first."""
    stored = session.head
    ours = len(resident.tokens)
    if stored.length <= ours and resident.digest_at(stored.length) == stored.digest:
        return stored.length
    end = min(stored.length, ours)
    tokens = await store.read_tokens(session, 0, end)
    for index, (theirs, mine) in enumerate(zip(tokens, resident.tokens, strict=False)):
        if theirs != mine:
            return index
    return len(tokens)
