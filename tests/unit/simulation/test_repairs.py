"""What a repair must not do: each rule is broken once, and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.simulation.checkers.rules import illegal
from loadtest.simulation.checkers.stored import Seen, SeenTurn
from statestore.executor import Script, ScriptCall

OLD, NEW = (5, b"n"), (6, b"m")
R1, R2 = (b"r1", b"1"), (b"r2", b"2")
T0 = SeenTurn(b"COMMITTED", b"2", b"1", 9_000, b"0")
T1 = SeenTurn(b"RUNNING", b"", b"1", 9_000, b"2")
KEPT, LOST = b"aaaabbbb", b"aaaabbbbccccdddd"
SHORT = Seen(b"OPEN", KEPT, (b"2", b"d2"), OLD, R1, b"", {b"t0": T0})
"""What the store has after it lost the turn t1."""
WHOLE = replace(SHORT, ledger=LOST, head=(b"4", b"d4"), turns={b"t0": T0, b"t1": T1})
OTHERS = replace(
    SHORT,
    ledger=KEPT + b"xxxx",
    head=(b"3", b"x3"),
    turns={b"t0": T0, b"u1": SeenTurn(b"COMMITTED", b"3", b"1", 9_000, b"2")},
)
"""What its older owner wrote meanwhile."""
RECLAIMED = replace(WHOLE, epoch=NEW, owner=R2)
CANCELLED = SeenTurn(b"CANCELLED", b"3", b"1", 9_000, b"2")
CUT = replace(SHORT, ledger=LOST[:12], head=(b"3", b"d3"), turns={b"t0": T0, b"t1": CANCELLED})
LONGER = replace(WHOLE, turns={b"t0": T0, b"t1": replace(CANCELLED, end=b"4")})


def repair(now: Seen, keep: int, tokens: bytes) -> ScriptCall:
    args = (*now.epoch, *now.owner, *OLD, 0, b"", keep, tokens, *now.head, "t1", 1, "ses_a")
    return ScriptCall(Script("repair", ""), ("k",), args)


def judged(
    before: Seen, now: Seen, keep: int, tokens: bytes, lost: bytes | None = LOST
) -> list[str]:
    return illegal(before, now, repair(now, keep, tokens), b"appended", 0, lost)


@pytest.mark.parametrize(
    ("before", "now", "keep", "tokens"),
    [
        (SHORT, WHOLE, 2, LOST[8:]),
        (OTHERS, RECLAIMED, 2, LOST[8:]),
        (WHOLE, WHOLE, 4, b""),
        (CUT, LONGER, 3, LOST[12:]),
        (replace(SHORT, turns={}), replace(WHOLE, turns={b"t0": T0}), 2, LOST[8:]),
    ],
    ids=["lost", "reclaimed", "repeated", "lengthened", "ended turns come back too"],
)
def test_an_owner_may_put_back_what_was_lost(
    before: Seen, now: Seen, keep: int, tokens: bytes
) -> None:
    assert judged(before, now, keep, tokens) == []


def test_a_fork_counts_from_where_its_own_tokens_begin() -> None:
    before, now = replace(SHORT, own_base=10), replace(WHOLE, own_base=10)
    assert judged(before, now, 12, LOST[8:]) == []
    assert judged(before, now, 9, LOST[8:]) != []


@pytest.mark.parametrize(
    ("rule", "before", "now", "keep", "tokens", "lost"),
    [
        ("I1", SHORT, replace(WHOLE, ledger=b"aaaaxxxxccccdddd"), 2, LOST[8:], LOST),
        ("I1", SHORT, WHOLE, 2, b"cccceeee", LOST),
        ("I1", OTHERS, RECLAIMED, 2, LOST[8:], None),
        ("I1", OTHERS, WHOLE, 2, LOST[8:], LOST),
        ("P1", SHORT, WHOLE, 2, LOST[8:], KEPT + b"yyyy"),
        ("I3", CUT, replace(LONGER, turns={b"t0": T0, b"t1": T1}), 3, LOST[12:], LOST),
        ("I3", SHORT, replace(WHOLE, turns={b"t1": T1}), 2, LOST[8:], LOST),
        ("I3", OTHERS, replace(RECLAIMED, turns={b"t1": T1}), 2, LOST[8:], LOST),
        ("I3", CUT, replace(LONGER, turns={b"t0": T0}), 3, LOST[12:], LOST),
        (
            "I7",
            replace(CUT, turns={b"t0": T0, b"t1": T1}),
            replace(WHOLE, turns={b"t0": T0}),
            3,
            LOST[12:],
            LOST,
        ),
    ],
)
def test_a_repair_that_does_more_is_told_by_its_rule(
    rule: str, before: Seen, now: Seen, keep: int, tokens: bytes, lost: bytes | None
) -> None:
    wrong = judged(before, now, keep, tokens, lost)
    assert wrong[0].startswith(f"{rule}: ")


def test_a_head_that_was_not_asked_for_is_told() -> None:
    args = repair(WHOLE, 2, LOST[8:])
    wrong = illegal(SHORT, replace(WHOLE, head=(b"4", b"zz")), args, b"appended", 0, LOST)
    assert [what.partition(":")[0] for what in wrong] == ["P1"]


@pytest.mark.parametrize(
    "ended",
    [
        replace(CANCELLED, status=b"COMMITTED"),
        replace(CANCELLED, end=b"2"),
        replace(CANCELLED, end=b"5"),
        replace(CANCELLED, end=b"4", deadline_ms=1),
    ],
    ids=["as another end", "shorter", "past the head", "with another deadline"],
)
def test_a_cancelled_turn_does_not_come_back(ended: SeenTurn) -> None:
    now = replace(LONGER, turns={b"t0": T0, b"t1": ended})
    assert any(what.startswith("I3: ") for what in judged(CUT, now, 3, LOST[12:]))


def test_a_cancelled_turn_is_not_lengthened_over_one_that_began_after_it() -> None:
    later = SeenTurn(b"COMMITTED", b"4", b"1", 9_000, b"3")
    before = replace(
        CUT, ledger=LOST[:12] + b"xxxx", head=(b"4", b"x4"), turns={**CUT.turns, b"t2": later}
    )
    now = replace(LONGER, epoch=NEW, owner=R2)
    assert any(what.startswith("I3: ") for what in judged(before, now, 3, LOST[12:]))
