"""What an owner that puts back what the store lost may do, and no more (P1, P2).

A repair keeps a first part of the stored ledger and writes what follows anew. Where the stored
ledger goes on behind that part, it is given up: that takes a loss of writes, after which the stored
owner wrote without knowing of a later one, and the later one's epoch (P2: it re-claims). Turns go
as their tokens do: what is kept of the ledger keeps its turns as they ended, except that one which
the store ended early (a cancel or a deadline that came between the loss and the repair) may get
back the output that it had.
"""

from __future__ import annotations

from collections.abc import Iterator

from loadtest.simulation.checkers.ledgers import TOKEN_BYTES
from loadtest.simulation.checkers.stored import ENDED_BY_STORE, Seen, SeenTurn, as_bytes
from statestore.executor import ScriptCall

KEEP, TOKENS, HEAD = 8, 9, slice(10, 12)
"""Where among a repair's arguments is how many tokens stay, what is written behind them, and the
head that this makes."""


def of_repair(before: Seen, now: Seen, call: ScriptCall, lost: bytes | None) -> Iterator[str]:
    """What a repair did to the ledger and to turns that it must not. ``lost``: the last ledger that
    the store had under the repair's epoch; None if it has lost no writes."""
    if (now.ledger, now.head, now.epoch, now.turns) == (
        before.ledger,
        before.head,
        before.epoch,
        before.turns,
    ):
        return
    kept = TOKEN_BYTES * (int(call.args[KEEP]) - now.own_base)
    if kept < 0 or now.ledger[:kept] != before.ledger[:kept]:
        yield f"I1: a repair changed tokens before {int(call.args[KEEP])}, which it was to keep"
    elif now.ledger[kept:] != as_bytes(call.args[TOKENS]):
        yield "I1: a repair wrote other tokens than it was given"
    if now.head != tuple(map(as_bytes, call.args[HEAD])):
        yield f"P1: a repair left the head at {now.head[0]!r}, not where it was asked to"
    gives_up = not now.ledger.startswith(before.ledger)
    if gives_up and (lost is None or now.epoch[0] <= before.epoch[0]):
        why = "though the store lost nothing" if lost is None else "under no later epoch"
        yield f"I1: a repair gave up tokens of {before.epoch}, {why}"
    if lost is not None and not (now.ledger.startswith(lost) or lost.startswith(now.ledger)):
        yield f"P1: a repair under {now.epoch} puts back other tokens than were lost"
    for name, turn in before.turns.items():
        after = now.turns.get(name)
        if after == turn or (gives_up and after is None and _reaches_past(turn, before, kept)):
            continue
        if turn.ended and not (after is not None and _lengthened(turn, after, before, now)):
            yield f"I3: a repair made {after} of {name!r}, which was {turn}"
        elif not turn.ended and after is None:
            yield f"I7: a repair dropped {name!r}, which was {turn}"


def _reaches_past(turn: SeenTurn, before: Seen, kept: int) -> bool:
    end = int(turn.end) if turn.ended else int(before.head[0])
    return TOKEN_BYTES * (end - before.own_base) > kept


def _lengthened(turn: SeenTurn, after: SeenTurn, before: Seen, now: Seen) -> bool:
    """The store had ended it before its owner could put back what it had: it is still what the
    store made of it, and what was stored of its output is the beginning of what it is now."""
    end = TOKEN_BYTES * (int(turn.end) - before.own_base)
    return (
        after.ended  # perhaps otherwise: the store had lost its owner's end as well
        and turn.status in ENDED_BY_STORE
        and turn.deadline_ms == after.deadline_ms
        and int(turn.end) < int(after.end) <= int(now.head[0])
        and before.ledger[:end] == now.ledger[:end]
        and all(int(other.start) < int(turn.end) for other in before.turns.values())
    )
