"""What one script must not do to a session: each rule is broken once, and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.simulation.checkers.rules import illegal
from loadtest.simulation.checkers.stored import Seen, SeenTurn, seen
from statestore.executor import Script, ScriptCall

EPOCH, LATER = (5, b"n"), (6, b"m")
R1, R2 = (b"r1", b"1"), (b"r2", b"2")
RUNNING = SeenTurn(b"RUNNING", b"", b"1", 9_000, b"0")
DONE = SeenTurn(b"COMMITTED", b"2", b"1", 9_000, b"0")
BUSY = Seen(b"OPEN", b"aaaabbbb", (b"2", b"d2"), EPOCH, R1, b"", {b"t0": RUNNING})
IDLE = replace(BUSY, turns={b"t0": DONE})


def call(name: str, *args: bytes | str | int) -> ScriptCall:
    return ScriptCall(Script(name, ""), ("k",), args)


def judged(
    before: Seen, now: Seen, script: ScriptCall, outcome: bytes = b"", at_ms: int = 1_000
) -> list[str]:
    return illegal(before, now, script, outcome, at_ms, None)


APPEND = call("append", *EPOCH)
TAKE = call("take", *EPOCH, "r2", "2")
GROWN = replace(BUSY, ledger=b"aaaabbbbcccc", head=(b"3", b"d3"))
TAKEN = replace(BUSY, epoch=LATER, owner=R2, turns={b"t0": replace(RUNNING, status=b"INTERRUPTED")})
SWITCH = call("switch_migration", *EPOCH, "mig", 2, b"d2", "t0", b"m")


@pytest.mark.parametrize(
    ("before", "now", "script", "outcome"),
    [
        (BUSY, GROWN, APPEND, b"appended"),
        (BUSY, replace(GROWN, turns={b"t0": replace(DONE, end=b"3")}), APPEND, b"appended"),
        (BUSY, TAKEN, TAKE, b"written"),
        (IDLE, replace(IDLE, state=b"CLOSED", owner=(b"", b""), epoch=LATER), call("close"), b""),
        (BUSY, TAKEN, SWITCH, b"written"),
    ],
    ids=["append", "commit", "take", "close", "switch"],
)
def test_what_scripts_are_for_is_legal(
    before: Seen, now: Seen, script: ScriptCall, outcome: bytes
) -> None:
    assert judged(before, now, script, outcome) == []


@pytest.mark.parametrize(
    ("rule", "before", "now", "script", "outcome", "at_ms"),
    [
        ("I1", BUSY, replace(GROWN, ledger=b"aaaaxxxxcccc"), APPEND, b"appended", 0),
        ("I1", BUSY, replace(BUSY, ledger=b"aaaa"), APPEND, b"appended", 0),
        ("I1", BUSY, GROWN, call("append", 4, b"n"), b"appended", 0),
        ("I1", BUSY, replace(BUSY, epoch=(5, b"m")), TAKE, b"written", 0),
        ("I1", BUSY, replace(BUSY, epoch=(4, b"m")), TAKE, b"written", 0),
        ("I1", BUSY, replace(BUSY, owner=R2), TAKE, b"written", 0),
        ("P2", replace(IDLE, state=b"CLOSED"), IDLE, call("begin", *EPOCH), b"begun", 0),
        ("I3", IDLE, replace(IDLE, turns={b"t0": replace(DONE, end=b"1")}), APPEND, b"", 0),
        ("I3", IDLE, replace(IDLE, turns={b"t0": RUNNING}), call("resume"), b"resumed", 0),
        ("I3", IDLE, replace(IDLE, turns={}), call("begin", *EPOCH), b"begun", 0),
        ("I7", BUSY, replace(BUSY, turns={}), TAKE, b"written", 0),
        ("P5", BUSY, IDLE, APPEND, b"appended", 0),
        ("P4", BUSY, GROWN, APPEND, b"appended", 9_001),
        ("P4", BUSY, TAKEN, TAKE, b"written", 9_001),
        ("P12", BUSY, TAKEN, call("switch_migration", *EPOCH, "", 1, b"d1", "t0"), b"written", 0),
        ("P12", BUSY, TAKEN, call("switch_migration", *EPOCH, "", 2, b"d2", ""), b"written", 0),
        ("P12", IDLE, TAKEN, SWITCH, b"written", 0),
    ],
)
def test_what_breaks_a_rule_is_told_by_its_name(
    rule: str, before: Seen, now: Seen, script: ScriptCall, outcome: bytes, at_ms: int
) -> None:
    assert any(what.startswith(f"{rule}: ") for what in judged(before, now, script, outcome, at_ms))


def test_a_take_that_is_repeated_did_nothing_late() -> None:
    taken = replace(BUSY, epoch=LATER)
    assert judged(taken, taken, TAKE, b"written", 9_001) == []


def test_a_record_is_read_with_its_turns() -> None:
    record = {
        b"state": b"OPEN",
        b"length": b"3",
        b"digest": b"d",
        b"epoch": b"5",
        b"nonce": b"n",
        b"owner": b"r1",
        b"owner_inc": b"1",
        b"active": b"t1",
        b"own_base": b"1",
        b"t:t0:status": b"COMMITTED",
        b"t:t0:end_len": b"2",
        b"t:t0:deadline": b"7",
        b"t:t1:status": b"RUNNING",
        b"t:t1:input_start": b"2",
    }
    found = seen(record, b"aaaabbbb")
    assert found.running == [b"t1"]
    assert found.turns[b"t0"] == SeenTurn(b"COMMITTED", b"2", b"", 7, b"0")
    assert (found.epoch, found.owner, found.own_base) == (EPOCH, R1, 1)
