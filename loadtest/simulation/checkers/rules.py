"""What one script must not do to a session: judged from the stored record before and after it."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.core.machines import SessionPhase
from loadtest.simulation.checkers.repairs import of_repair
from loadtest.simulation.checkers.stored import Seen, as_bytes
from statestore.executor import ScriptCall

OBEYS_DEADLINES = {
    "append": (b"appended",),
    "resume": (b"resumed",),
    "take": (b"written",),
    "switch_migration": (b"written",),
    "suspend": (b"written",),
    "cancel": (b"ended",),
}
"""Scripts that end a turn past its deadline -> the outcomes with which they did what they were
asked for."""


def illegal(
    before: Seen, now: Seen, call: ScriptCall, outcome: bytes, store_ms: int, lost: bytes | None
) -> list[str]:
    """What the script did that it must not, at this time of the store's clock. ``lost``: the last
    ledger that the store had under the epoch that it has now; None if it has lost no writes."""
    moved = call.script.name in ("take", "switch_migration")
    if moved and before.epoch == now.epoch:
        outcome = b"repeated"
    kept = call.script.name != "repair"
    return [
        *_of_ledger(before, now, call),
        *(_of_turns(before, now, call) if kept else of_repair(before, now, call, lost)),
        *_of_deadlines(before, now, call, outcome, store_ms),
        *_of_switch(before, call, outcome, store_ms),
    ]


def _of_ledger(before: Seen, now: Seen, call: ScriptCall) -> Iterator[str]:
    if not now.ledger.startswith(before.ledger) and call.script.name != "repair":
        yield "I1: the ledger was rewritten"
    if now.ledger != before.ledger and call.args[:2] != now.epoch:
        yield f"I1: written under {call.args[:2]}, not {now.epoch}"
    if now.epoch != before.epoch and now.epoch[0] <= before.epoch[0]:
        yield f"I1: epoch {now.epoch} after {before.epoch}"
    if now.owner[0] and now.owner != before.owner and now.epoch == before.epoch:
        rule = "P12" if call.script.name == "switch_migration" else "I1"
        yield f"{rule}: {before.owner} became {now.owner} in one epoch"
    if now.owner[0] and now.phase in (SessionPhase.SUSPENDED, SessionPhase.CLOSED):
        yield f"I4: {now.owner} is the owner of a session that is {now.phase}"
    if before.phase is SessionPhase.CLOSED and now.phase is not before.phase:
        yield f"P2: a closed session became {now.phase}"


def _of_turns(before: Seen, now: Seen, call: ScriptCall) -> Iterator[str]:
    for name, turn in before.turns.items():
        after = now.turns.get(name)
        if turn.ended and after != turn:
            yield f"I3: {name!r} was {turn}, is {after}"
        elif after is None:
            yield f"I7: {name!r} was {turn}, and was dropped"
        committed = after is not None and after.status == b"COMMITTED" != turn.status
        if committed and call.script.name == "append" and now.ledger == before.ledger:
            yield f"P5: {name!r} was committed after its last tokens, not with them"


def _of_deadlines(
    before: Seen, now: Seen, call: ScriptCall, outcome: bytes, store_ms: int
) -> Iterator[str]:
    if outcome not in OBEYS_DEADLINES.get(call.script.name, ()):
        return
    for name in before.running:
        turn, after = before.turns[name], now.turns.get(name)
        if turn.deadline_ms < store_ms and (after is None or after.status != b"FAILED"):
            late_ms = store_ms - turn.deadline_ms
            yield f"P4: {name!r}, due {late_ms} ms ago, is {after}"


def _of_switch(before: Seen, call: ScriptCall, outcome: bytes, store_ms: int) -> Iterator[str]:
    if call.script.name != "switch_migration" or outcome != b"written":
        return
    verified = tuple(as_bytes(part) for part in call.args[3:5])
    if verified != before.head:
        yield f"P12: {verified[0]!r} tokens were verified, the ledger has {before.head[0]!r}"
    active = [n for n in before.running if before.turns[n].deadline_ms > store_ms]
    asked = as_bytes(call.args[5])
    if active != ([asked] if asked else []):
        yield f"P12: switched with {asked!r} running, not {active}"
