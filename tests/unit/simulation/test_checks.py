"""The checkers of a session's ledger and of what its clients heard are silent about what is right,
and name the rule that is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.checkers.checks import body_of, check_session
from loadtest.simulation.checkers.reference import Digests
from loadtest.simulation.clients.heard import TurnHeard
from statestore.digest import RollingDigest
from statestore.records import FinishReason, Position, TurnStatus
from tests.unit.simulation.small_world import ENGINE, SALT, Told, asked, other_tokens, told

Change = Callable[[Told], Told]


def found(it: Told) -> list[str]:
    return check_session(it.session, it.turns, it.ledger, SALT, ENGINE, it.heard)


def usual() -> Told:
    return told(
        asked("t0", "look at that", max_tokens=40, temperature=1.0, ignore_eos=True),
        asked("t1", "é€ and this", max_tokens=30, seed=7),
    )


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1},
        {"max_tokens": 60},
        {"max_tokens": 60, "temperature": 1.0, "seed": 3},
        {"max_tokens": 60, "ignore_eos": True},
        {"max_tokens": 60, "ignore_eos": True, "min_tokens": 30, "stop": ["a"]},
        {"max_tokens": 60, "ignore_eos": True, "stop": ["a"]},
        {"max_tokens": 60, "ignore_eos": True, "stop": ["e ", " "]},
        {"max_tokens": 60, "ignore_eos": True, "stop_token_ids": [ord("r")]},
        {"max_tokens": 60, "min_tokens": 30, "stop_token_ids": [ord("r")]},
    ],
)
def test_what_the_product_says_by_itself_is_right(params: dict[str, object]) -> None:
    it = told(*(asked(f"t{index}", f"look {index}", **params) for index in range(4)))
    assert found(it) == []


def test_the_digests_are_the_ledgers_at_every_position() -> None:
    tokens = [number * 7919 % 262 for number in range(200)]
    digests = Digests(SALT, tokens)
    for length in range(len(tokens) + 1):
        assert digests.at(length) == RollingDigest.of(SALT, tokens[:length]).position().digest
    assert digests.at(201) is None


def rehashed(it: Told) -> Told:
    """With the digests of its ledger: the tokens alone are wrong."""
    digests = Digests(SALT, it.ledger)

    def at(place: Position) -> Position:
        return Position(place.length, digests.at(place.length) or b"")

    turns = tuple(
        replace(t, output_start=at(t.output_start), output_end=at(t.output_end)) for t in it.turns
    )
    head = at(Position(len(it.ledger), b""))
    return replace(it, session=replace(it.session, head=head), turns=turns)


def ledger_says_otherwise(where: str) -> Change:
    def change(it: Told) -> Told:
        last = it.turns[-1]
        at = {"input": last.input_start + 2, "output": last.output_start.length}[where]
        return replace(rehashed(replace(it, ledger=other_tokens(it.ledger, at))), heard=())

    return change


def result(index: int, **fields: Any) -> Change:
    def change(it: Told) -> Told:
        was = it.turns[index].result
        assert was is not None
        return it.with_turn(index, result=replace(was, **fields))

    return change


def without_its_last_token(it: Told) -> Told:
    """It is committed before its end."""
    ledger = it.ledger[:-1]
    end = RollingDigest.of(SALT, ledger).position()
    short = replace(it, ledger=ledger, session=replace(it.session, head=end), heard=())
    return short.with_turn(1, output_end=end)


LEDGERS: list[tuple[str, Change]] = [
    ("tokens are there of", lambda it: replace(it, ledger=it.ledger[:-1])),
    ("I1: the ledger does not have its head's digest", lambda it: replace(
        it, session=replace(it.session, head=replace(it.session.head, digest=b"other")))),
    ("I1: the ledger has", lambda it: replace(it, turns=it.turns[:1])),
    ("I3: a turn id is in the ledger twice", lambda it: it.with_turn(
        1, spec=replace(it.turns[1].spec, turn_id="t0"))),
    ("I3: turn 2 starts at", lambda it: it.with_turn(1, index=2)),
    ("I3: turn 1 starts at", lambda it: it.with_turn(1, input_start=it.turns[1].input_start + 1)),
    ("I7: it is RUNNING", lambda it: it.with_turn(1, status=TurnStatus.RUNNING)),
    ("P1: its digest at", lambda it: it.with_turn(
        0, output_end=replace(it.turns[0].output_end, digest=b"other"))),
    ("P1: its digest at", lambda it: it.with_turn(
        0, output_start=replace(it.turns[0].output_start, digest=b"other"))),
    ("P18: its input is not in the ledger as given", ledger_says_otherwise("input")),
    ("I2: its output is not what the model says", ledger_says_otherwise("output")),
    ("P5: it was committed after", without_its_last_token),
    ("P5: it has no result", lambda it: it.with_turn(0, result=None)),
    ("P5: it is COMMITTED, its reason is stop", result(0, reason=FinishReason.STOP)),
    ("P5: it is CANCELLED, its reason is length", lambda it: it.with_turn(
        0, status=TurnStatus.CANCELLED)),
    ("P17: its text ends at 3", result(0, text_end=3)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change"), LEDGERS, ids=[rule for rule, _ in LEDGERS])
def test_a_ledger_that_is_wrong_is_told_by_its_rule(rule: str, change: Change) -> None:
    it = usual()
    assert found(it) == []
    assert any(rule in what for what in found(change(it))), found(change(it))


def hears(alter: Callable[[TurnHeard], object]) -> Change:
    """The client of the last turn heard something else."""

    def change(it: Told) -> Told:
        heard = [copy.deepcopy(one) for one in it.heard]
        alter(heard[1])
        return replace(it, heard=tuple(heard))

    return change


def finished(**fields: Any) -> Change:
    """The client was told another end."""

    def alter(heard: TurnHeard) -> None:
        assert heard.finished is not None
        heard.finished.MergeFrom(pb.TurnFinished(**fields))

    return hears(alter)


def has(**fields: Any) -> Change:
    """The client has something else."""
    return lambda it: replace(it, heard=(it.heard[0], replace(it.heard[1], **fields)))


def stored(alter: Callable[[pb.RunTurnRequest], object]) -> Change:
    """The turn was accepted with other parameters than its client's."""

    def change(it: Told) -> Told:
        body = body_of(it.turns[1])
        alter(body)
        return it.with_turn(1, spec=replace(it.turns[1].spec, body=body.SerializeToString()))

    return change


def set_params(**params: Any) -> Callable[[pb.RunTurnRequest], object]:
    return lambda body: body.params.MergeFrom(pb.SamplingParams(**params))


HEARD: list[tuple[str, Change]] = [
    ("I2: accepted at 3 as turn 1", has(start=pb.Position(length=3), digests={})),
    ("as turn 4, not", has(index=4)),
    ("P4: told the seed 5", has(seed=5)),
    ("I2: the client has other tokens", hears(lambda h: h.tokens.__setitem__(0, 1))),
    ("I2: the client has other tokens", hears(lambda h: h.tokens.append(1))),
    ("P1: the digest told at", hears(lambda h: h.digests.update(dict.fromkeys(h.digests, b"x")))),
    ("P1: the digest told at", hears(lambda h: setattr(h.start, "digest", b"x"))),
    ("P17: the client has other text", hears(lambda h: setattr(h, "text", "?" + h.text[1:]))),
    ("P17: told", hears(lambda h: setattr(h, "text", h.text[:-1]))),
    ("I2: told 4, the ledger says", finished(status=pb.TURN_STATUS_CANCELLED)),
    ("I2: told the reason 5", finished(reason=pb.FINISH_REASON_DEADLINE)),
    ("I2: told the end at 9999", finished(end=pb.Position(length=9999))),
    ("P1: the digest told at the end", finished(end=pb.Position(digest=b"x"))),
    ("I2: told usage (1, ", finished(usage=pb.Usage(input_tokens=1))),
    ("I2: told usage", finished(usage=pb.Usage(cached_tokens=5000))),
    ("I7: it was accepted and is not in the ledger", has(turn_id="t9")),
    ("I2: said so before", has(violations=["I2: said so before"])),
    ("P4: it was stored with other messages", stored(
        lambda body: setattr(body.messages[0], "content", "other"))),
    ("P4: it was stored with another seed", stored(set_params(seed=8))),
    ("P4: it was stored with another max_tokens", stored(set_params(max_tokens=31))),
    ("P4: it was stored with another temperature", hears(
        lambda h: h.request.params.MergeFrom(pb.SamplingParams(temperature=1.5)))),
    ("P4: it was stored with another stop", hears(lambda h: h.request.params.stop.append("a"))),
    ("P4: it was stored with another ignore_eos", hears(
        lambda h: setattr(h.request.params, "ignore_eos", True))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change"), HEARD, ids=[rule for rule, _ in HEARD])
def test_what_a_client_heard_wrongly_is_told_by_its_rule(rule: str, change: Change) -> None:
    it = usual()
    assert any(rule in what for what in found(change(it))), found(change(it))


def test_who_left_early_has_a_beginning_of_it_and_that_is_right() -> None:
    def leave(heard: TurnHeard) -> None:
        heard.finished, heard.tokens, heard.digests = None, heard.tokens[:3], {}
        heard.text = heard.text[:2]

    assert found(hears(leave)(usual())) == []


def test_a_client_that_was_told_of_a_loss_may_have_what_the_ledger_has_not() -> None:
    lost = has(turn_id="t9", given_up=True)(usual())
    assert found(lost) == []


def test_a_client_that_was_told_of_a_loss_still_says_what_was_wrong_with_its_streams() -> None:
    lost = has(given_up=True, violations=["I2: tokens at 3, not 2"])(usual())
    assert found(lost) == ["t1: I2: tokens at 3, not 2"]


def test_a_turn_is_bounded_by_the_context_that_is_left() -> None:
    long = asked("t0", "look " * 60, max_tokens=500, ignore_eos=True)
    it = told(long)
    assert any("max_tokens" in what for what in found(it))
    body = body_of(it.turns[0])
    body.params.max_tokens = ENGINE.max_context_tokens - it.turns[0].output_start.length
    resolved = replace(it.turns[0].spec, body=body.SerializeToString())
    assert found(it.with_turn(0, spec=resolved)) == []
