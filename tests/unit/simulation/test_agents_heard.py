"""What one client can tell of its own streams: right ones are silent, each wrong one is told."""

from __future__ import annotations

import pytest
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.clients.heard import TurnHeard
from tests.unit.simulation.small_world import accepted, asked

START = pb.Position(length=10, digest=b"d10")
AGAIN = "again"
"""A new stream begins."""


def heard_of(*events: pb.TurnEvent | str) -> TurnHeard:
    heard = TurnHeard("ses_a", "t0", asked("t0", "x"))
    for event in events:
        if isinstance(event, str):
            heard.begin_stream()
        else:
            heard.hear(event)
    return heard


def begun(length: int = 10, index: int = 3, seed: int = 5, turn_id: str = "t0") -> pb.TurnEvent:
    named = TurnHeard("ses_a", turn_id, pb.RunTurnRequest())
    return accepted(named, pb.Position(length=length, digest=b"d10"), index, seed)


def tokens(position: int, *ids: int, text: str = "", at: int = 0) -> pb.TurnEvent:
    digest = b"d%d" % (position + len(ids))
    said = pb.TurnTokens(position=position, token_ids=ids, digest=digest, text=text, text_offset=at)
    return pb.TurnEvent(tokens=said)


def done(text: str = "", at: int = 0, end: int = 0) -> pb.TurnEvent:
    return pb.TurnEvent(finished=pb.TurnFinished(text=text, text_offset=at, text_end=end))


MOVED = pb.TurnEvent(moved=pb.TurnMoved())
WAITING = pb.TurnEvent(waiting=pb.TurnWaiting())
REDIRECT = pb.TurnEvent(redirect=pb.TurnRedirect())


@pytest.mark.parametrize(
    "events",
    [
        (begun(), tokens(10, 1, 2), done()),
        (WAITING, begun(), MOVED, tokens(10, 97, text="a"), done("b", 1, 2)),
        (begun(), tokens(10, 1), AGAIN, begun(), tokens(11, 2), done()),
        (AGAIN, WAITING, AGAIN, begun()),
    ],
)
def test_a_turn_over_several_streams_is_right(events: tuple[pb.TurnEvent | str, ...]) -> None:
    assert heard_of(*events).violations == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ((tokens(10, 1),), "tokens before the turn was accepted"),
        ((begun(), AGAIN, tokens(10, 1)), "tokens before the turn was accepted"),
        ((begun(), begun()), "accepted a second time in one stream"),
        ((begun(), AGAIN, begun(11)), "the output moved"),
        ((begun(), AGAIN, begun(index=4)), "accepted with another index or seed than before"),
        ((begun(), AGAIN, begun(seed=6)), "accepted with another index or seed than before"),
        ((begun(turn_id="t1"),), "t1 was accepted"),
        ((begun(), tokens(11, 1)), "tokens at 11, not 10"),
        ((begun(), tokens(10, 1), AGAIN, begun(), tokens(10, 1)), "tokens at 10, not 11"),
        ((begun(), tokens(10, 97, text="a", at=1)), "text at 1, not 0"),
        ((begun(), done("a", 0, 3)), "the text ends elsewhere"),
        ((begun(), done(), done()), "finished twice"),
        ((begun(), done(), tokens(10, 1)), "tokens after the end"),
        ((begun(), done(), WAITING), "waiting after the end"),
        ((begun(), REDIRECT), "unexpected redirect"),
    ],
)
def test_what_no_stream_may_say_is_told(
    events: tuple[pb.TurnEvent | str, ...], complaint: str
) -> None:
    (told,) = heard_of(*events).violations
    rule, _, what = told.partition(": ")
    assert rule in ("I2", "P17")
    assert what == complaint


def test_a_client_goes_on_from_its_last_token() -> None:
    assert heard_of(begun()).resume_from is None
    assert heard_of(begun(), tokens(10, 1, 2)).resume_from == pb.Position(length=12, digest=b"d12")
