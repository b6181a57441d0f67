"""Framing of a turn's stream, held to protobuf: whatever the bytes, both see the same events."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from sessile.v1 import types_pb2 as pb

from gateway.app.frames import BadFrame, Kind, event_of, events
from gateway.app.relay import TurnCursor
from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz

FIELDS = {field.name: field.number for field in pb.TurnEvent.DESCRIPTOR.fields}


def stream(hostile: Hostile) -> pb.TurnStream:
    """A valid message with any events."""
    message = hostile.message(pb.TurnStream)
    for _ in range(hostile.draw.randrange(4)):
        message.MergeFrom(hostile.message(pb.TurnStream))
    return message


def parsed(data: bytes) -> pb.TurnStream | None:
    try:
        return pb.TurnStream.FromString(data)
    except DecodeError:
        return None


@fuzz(300)
@given(seeds)
def test_a_valid_stream_is_cut_where_protobuf_sees_its_events(seed: int) -> None:
    message = stream(Hostile(seed))
    data = message.SerializeToString()
    cut = list(events(data))
    assert b"".join(data[start:end] for _, start, end in cut) == data
    assert len(cut) == len(message.events)
    for (kind, start, end), event in zip(cut, message.events, strict=True):
        assert event_of(data[start:end]).SerializeToString() == event.SerializeToString()
        assert kind == FIELDS.get(event.WhichOneof("event") or "", Kind.OTHER)


@fuzz(600)
@given(seeds)
def test_damaged_bytes_are_refused_or_cut_without_loss(seed: int) -> None:
    hostile = Hostile(seed)
    data = hostile.damage(stream(hostile).SerializeToString())
    message = parsed(data)
    try:
        cut = list(events(data))
    except BadFrame:
        # Only what no serialiser of a TurnStream writes may be refused though protobuf takes it.
        if message is not None:
            message.DiscardUnknownFields()
            assert message.SerializeToString() != data
        return
    assert b"".join(data[start:end] for _, start, end in cut) == data
    if message is not None:
        assert len(cut) == len(message.events)


@fuzz(300)
@given(st.binary(max_size=64))
def test_random_bytes_are_refused_or_cut_without_loss(data: bytes) -> None:
    try:
        cut = list(events(data))
    except BadFrame:
        return
    assert b"".join(data[start:end] for _, start, end in cut) == data


@fuzz(400)
@given(seeds)
def test_a_cursor_fed_with_damaged_messages_passes_them_on_or_refuses_them(seed: int) -> None:
    """A replica of another version, or a broken one: the stream ends in BadFrame, and what is
    passed on are whole events."""
    hostile = Hostile(seed)
    cursor = TurnCursor(None, accepts_redirect=hostile.draw.random() < 0.5)
    for _ in range(4):
        data = stream(hostile).SerializeToString()
        if hostile.draw.random() < 0.3:
            data = hostile.damage(data)
        try:
            forward = cursor.feed(data)
            cursor.position()
        except BadFrame:
            return
        assert len(list(events(forward))) <= len(list(events(data))) + 1


def test_tokens_past_the_last_position_are_a_bad_frame() -> None:
    cursor = TurnCursor(None, accepts_redirect=False)
    last = pb.TurnTokens(position=2**64 - 1, token_ids=[1])
    cursor.feed(pb.TurnStream(events=[pb.TurnEvent(tokens=last)]).SerializeToString())
    with pytest.raises(BadFrame):
        cursor.position()
