"""What runs may take for a ledger after the store has lost some of it, and until when."""

from __future__ import annotations

from dataclasses import replace

from loadtest.simulation.checkers.lives import Lives
from loadtest.simulation.checkers.stored import Seen
from loadtest.simulation.loop import Process
from statestore.executor import Script, ScriptCall

OWNER = Process("r1")
FULL = Seen(b"OPEN", b"aaaabbbb", (b"2", b"d"), (5, b"n"), (b"r1", b"1"))
LESS = replace(FULL, ledger=b"aaaa", head=(b"1", b"c"))
KEY = "sessile:{a}:s:ses_a"


def call(name: str, *args: bytes | str | int) -> ScriptCall:
    return ScriptCall(Script(name, ""), (KEY,), args)


def started() -> Lives:
    lives = Lives()
    lives.began("ses_a", None, replace(LESS, ledger=b"", head=(b"0", b"")), call("place"), 0.0)
    return lives


def test_a_ledger_holds_its_own_tokens_where_they_are() -> None:
    life = Lives().now("ses_a", replace(FULL, own_base=10))
    assert life.holds(11, b"bbbb")
    assert not life.holds(10, b"bbbb")
    assert not life.holds(11, b"bbbbcccc")


def test_a_run_is_cut_off_where_the_next_epoch_begins() -> None:
    lives = started()
    lives.began("ses_a", LESS, replace(LESS, epoch=(6, b"m")), call("take"), 1.0)
    life = lives.now("ses_a", LESS)
    assert (life.cut_off_at(5), life.cut_off_at(6)) == (1, None)


def test_what_was_lost_may_be_sent_until_its_owner_hears_that_it_is_fenced() -> None:
    lives = started()
    lives.lost("ses_a", FULL, LESS, 2.0)
    assert [life.ledger for life in lives.former("ses_a", OWNER, 5)] == [FULL.ledger]
    refused = call("append", 5, b"n")
    lives.replied(refused, b"fenced")
    assert lives.former("ses_a", OWNER, 5)
    lives.answered(OWNER, [refused], 3.0)
    assert lives.former("ses_a", OWNER, 5) == []
    assert lives.former("ses_a", Process("r2"), 5), "another has not heard of it"


def test_an_answer_of_before_the_loss_tells_nothing_of_it() -> None:
    lives = started()
    refused = call("append", 5, b"n")
    lives.replied(refused, b"fenced")
    lives.answered(OWNER, [refused], 1.0)
    lives.lost("ses_a", FULL, LESS, 2.0)
    assert lives.former("ses_a", OWNER, 5)


def test_a_call_that_was_refused_and_then_done_fences_nobody() -> None:
    lives = started()
    lives.lost("ses_a", FULL, LESS, 2.0)
    repeated = call("append", 5, b"n")
    lives.replied(repeated, b"fenced")
    lives.replied(repeated, b"appended")
    lives.answered(OWNER, [repeated], 3.0)
    assert lives.former("ses_a", OWNER, 5)


def test_epochs_that_were_lost_cut_nobody_off() -> None:
    lives = started()
    lives.began("ses_a", LESS, replace(LESS, epoch=(6, b"m")), call("take"), 1.0)
    lives.lost("ses_a", replace(LESS, epoch=(6, b"m")), LESS, 2.0)
    assert lives.now("ses_a", LESS).cut_off_at(5) is None
    (life,) = lives.former("ses_a", OWNER, 5)
    assert life.cut_off_at(5) == 1


def test_nothing_is_former_of_a_session_that_lost_nothing() -> None:
    lives = started()
    lives.lost("ses_a", FULL, replace(FULL), 2.0)
    assert lives.former("ses_a", OWNER, 5) == []
    assert not lives.any_former("ses_a")


def test_a_loss_is_known_though_nobody_may_send_of_it_any_more() -> None:
    lives = started()
    lives.lost("ses_a", FULL, LESS, 2.0)
    refused = call("append", 5, b"n")
    lives.replied(refused, b"fenced")
    lives.answered(OWNER, [refused], 3.0)
    assert lives.any_former("ses_a")
    assert not lives.any_former("ses_b")


def test_a_repair_ends_the_ledger_that_it_gives_up_and_cuts_off_where_it_keeps() -> None:
    lives = started()
    before = replace(FULL, ledger=b"aaaaxxxx")
    now = replace(FULL, epoch=(6, b"m"), ledger=b"aaaabbbbcccc", head=(b"3", b"e"))
    args = (6, b"m", "r2", "2", 5, b"n", 2, b"d", 1, b"bbbbcccc", *now.head)
    lives.began("ses_a", before, now, call("repair", *args), 2.0)
    assert lives.now("ses_a", now).cut_off_at(5) == 1
    assert [life.ledger for life in lives.former("ses_a", OWNER, 5)] == [before.ledger]
