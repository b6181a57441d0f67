"""The client's fold of a turn: any cuts give the whole turn, any defect is noticed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessile import DataLoss, ProtocolError
from sessile.events import TurnFold
from sessile.v1 import types_pb2 as pb

START = 7
WORDS = ["a", "", "ü", "long word ", "🙂"]


def text_of(index: int) -> str:
    return WORDS[index % len(WORDS)]


def place(count: int) -> pb.Position:
    digest = hashlib.blake2b(str(count).encode(), digest_size=16).digest()
    return pb.Position(length=START + count, digest=digest)


def chunk(first: int, end: int) -> pb.TurnEvent:
    before = "".join(text_of(i) for i in range(first))
    return pb.TurnEvent(
        tokens=pb.TurnTokens(
            position=START + first,
            token_ids=list(range(first, end)),
            digest=place(end).digest,
            text="".join(text_of(i) for i in range(first, end)),
            text_offset=len(before),
        )
    )


ACCEPTED = pb.TurnEvent(accepted=pb.TurnAccepted(turn_id="t", output_start=place(0)))


def finished(count: int) -> pb.TurnEvent:
    return pb.TurnEvent(
        finished=pb.TurnFinished(
            status=pb.TURN_STATUS_COMMITTED,
            end=place(count),
            text_end=sum(len(text_of(i)) for i in range(count)),
        )
    )


def chunks(start: int, count: int, sizes: list[int]) -> list[pb.TurnEvent]:
    """Tokens ``[start, count)`` in chunks of these sizes, again and again."""
    events, at, turn = [], start, 0
    while at < count:
        end = min(count, at + sizes[turn % len(sizes)])
        events.append(chunk(at, end))
        at, turn = end, turn + 1
    return events


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(
    count=st.integers(1, 40),
    streams=st.lists(st.tuples(sizes, st.integers(0, 12)), max_size=6),
    last=sizes,
)
def test_a_turn_read_over_any_cuts_is_the_turn(
    count: int, streams: list[tuple[list[int], int]], last: list[int]
) -> None:
    fold = TurnFold(None)
    for stream_sizes, length in streams:
        fold.reconnected()
        at = 0 if fold.at is None else fold.at.length - START
        for event in [ACCEPTED, *chunks(at, count, stream_sizes)][:length]:
            fold.take(event)
    fold.reconnected()
    at = 0 if fold.at is None else fold.at.length - START
    for event in [ACCEPTED, *chunks(at, count, last), finished(count)]:
        fold.take(event)
    assert fold.token_ids == list(range(count))
    assert fold.text == "".join(text_of(i) for i in range(count))


@given(count=st.integers(2, 40), sizes=sizes, data=st.data())
def test_a_stream_with_a_defect_is_never_taken_for_whole(
    count: int, sizes: list[int], data: st.DataObject
) -> None:
    events = chunks(0, count, sizes)
    victim = data.draw(st.integers(0, len(events) - 1))
    defect = data.draw(st.sampled_from(["lost", "repeated", "swapped", "cut short"]))
    if defect == "lost":
        del events[victim]
    elif defect == "repeated":
        events.insert(victim, events[victim])
    elif defect == "swapped":
        events[victim - 1], events[victim] = events[victim], events[victim - 1]
        if len(events) == 1:
            events.clear()
    else:
        del events[victim:]
    with pytest.raises((ProtocolError, DataLoss)):
        read([ACCEPTED, *events, finished(count)])


def read(events: list[pb.TurnEvent]) -> None:
    fold = TurnFold(None)
    for event in events:
        fold.take(event)
