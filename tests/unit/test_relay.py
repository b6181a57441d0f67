"""The relay: bytes through, coalesced, bounded; event framing without parsing."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sessile.v1 import types_pb2 as pb

from gateway.app.frames import BadFrame, Kind, event_of, events, frame, waiting
from gateway.app.relay import Outbox, TurnCursor
from gateway.core.errors import Unavailable
from tests.support.gateway_world import simulated

REF_A = pb.ReplicaRef(replica_id="a", incarnation=1)
REF_B = pb.ReplicaRef(replica_id="b", incarnation=4)


def tokens(position: int, *ids: int) -> pb.TurnEvent:
    return pb.TurnEvent(
        tokens=pb.TurnTokens(position=position, token_ids=ids, digest=bytes([position] * 16))
    )


def accepted(ref: pb.ReplicaRef, attempt: int = 1) -> pb.TurnEvent:
    return pb.TurnEvent(accepted=pb.TurnAccepted(turn_id="t", attempt=attempt, replica=ref))


def finished() -> pb.TurnEvent:
    return pb.TurnEvent(finished=pb.TurnFinished(status=pb.TURN_STATUS_COMMITTED))


def redirect() -> pb.TurnEvent:
    return pb.TurnEvent(redirect=pb.TurnRedirect(replica=REF_B, endpoint="b:1"))


def message(*parts: pb.TurnEvent) -> bytes:
    return pb.TurnStream(events=parts).SerializeToString()


def parsed(data: bytes) -> list[pb.TurnEvent]:
    return list(pb.TurnStream.FromString(data).events)


EVENTS = st.sampled_from(
    [
        tokens(3, 1, 2, 3),
        tokens(9, *range(200)),
        accepted(REF_A),
        finished(),
        redirect(),
        pb.TurnEvent(waiting=pb.TurnWaiting(reason=pb.TurnWaiting.REASON_STORE)),
        pb.TurnEvent(moved=pb.TurnMoved(attempt=2)),
        pb.TurnEvent(),
    ]
)


@given(st.lists(EVENTS, max_size=8))
def test_events_are_cut_exactly_where_they_begin_and_end(parts: list[pb.TurnEvent]) -> None:
    data = message(*parts)
    cut = list(events(data))
    assert [event_of(data[start:end]) for _, start, end in cut] == parts
    assert b"".join(data[start:end] for _, start, end in cut) == data
    names = [(part.WhichOneof("event") or "other").upper() for part in parts]
    assert [kind.name for kind, _, _ in cut] == names


def test_kinds_that_this_code_is_too_old_for_pass_through() -> None:
    future = bytes([0x0A, 0x04, 0xBA, 0x01, 0x01, 0x00])  # TurnEvent with field 23
    assert [kind for kind, _, _ in events(future)] == [Kind.OTHER]
    assert TurnCursor(None, False).feed(future) == future


@pytest.mark.parametrize(
    "data",
    [b"\x12\x00", b"\x0a", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\xff\x01"],
    ids=["another field", "no length", "cut off", "length without end"],
)
def test_bytes_that_are_no_turn_stream_are_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        list(events(data))


def test_a_message_of_tokens_passes_as_the_same_object() -> None:
    cursor = TurnCursor(None, False)
    data = message(tokens(5, 1), tokens(6, 2))
    assert cursor.feed(data) is data


def test_the_position_is_known_after_the_last_token_event() -> None:
    start = pb.Position(length=2, digest=b"d" * 16)
    cursor = TurnCursor(start, False)
    assert cursor.position() == start
    cursor.feed(message(accepted(REF_A)))
    assert cursor.position() == start
    cursor.feed(message(tokens(5, 1, 2), tokens(7, 3)))
    cursor.feed(waiting(pb.TurnWaiting.REASON_STORE))
    assert cursor.position() == pb.Position(length=8, digest=bytes([7] * 16))


def test_the_client_sees_one_accepted_and_moved_instead_of_the_others() -> None:
    cursor = TurnCursor(None, False)
    first = parsed(cursor.feed(message(accepted(REF_A), tokens(5, 1))))
    assert [e.WhichOneof("event") for e in first] == ["accepted", "tokens"]
    again = cursor.feed(message(accepted(REF_A)))
    assert again == b""
    (moved, more) = parsed(cursor.feed(message(accepted(REF_B, attempt=2), tokens(6, 2))))
    assert moved.moved.to == REF_B
    assert getattr(moved.moved, "from") == REF_A
    assert moved.moved.attempt == 2
    assert moved.moved.reason == pb.TurnMoved.REASON_FAILOVER
    assert more == tokens(6, 2)


def test_a_move_of_the_same_size_as_what_it_replaces_is_shown() -> None:
    cursor = TurnCursor(None, False)
    cursor.feed(message(accepted(REF_A)))
    moved = pb.TurnMoved(
        to=REF_B, reason=pb.TurnMoved.REASON_FAILOVER, attempt=2, **{"from": REF_A}
    )
    replaced = accepted(REF_B, attempt=2)
    replaced.accepted.turn_id = "t" * (1 + moved.ByteSize() - replaced.accepted.ByteSize())
    assert len(message(replaced)) == len(message(pb.TurnEvent(moved=moved)))
    assert parsed(cursor.feed(message(replaced))) == [pb.TurnEvent(moved=moved)]


def test_a_planned_move_is_named_as_one_and_the_next_is_not() -> None:
    cursor = TurnCursor(None, False)
    cursor.feed(message(accepted(REF_A)))
    cursor.moved_because = pb.TurnMoved.REASON_MIGRATION
    (moved,) = parsed(cursor.feed(message(accepted(REF_B))))
    assert moved.moved.reason == pb.TurnMoved.REASON_MIGRATION
    (back,) = parsed(cursor.feed(message(accepted(REF_A))))
    assert back.moved.reason == pb.TurnMoved.REASON_FAILOVER


def test_a_redirect_is_kept_from_clients_that_do_not_follow_it() -> None:
    cursor = TurnCursor(None, False)
    assert parsed(cursor.feed(message(tokens(5, 1), redirect()))) == [tokens(5, 1)]
    assert cursor.redirect == redirect().redirect
    assert not cursor.finished


def test_a_redirect_ends_the_stream_of_clients_that_follow_it() -> None:
    cursor = TurnCursor(None, True)
    assert parsed(cursor.feed(message(redirect()))) == [redirect()]
    assert cursor.finished


def test_finished_is_noticed_in_a_coalesced_message() -> None:
    cursor = TurnCursor(None, False)
    cursor.feed(message(tokens(5, 1), finished()))
    assert cursor.finished


@simulated
async def test_everything_that_waits_is_sent_as_one_message() -> None:
    outbox, sent = Outbox(1000), []

    async def sink(data: bytes) -> None:
        sent.append(data)
        await anyio.sleep(1.0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.drain_to, sink)
        for number in range(10):
            await outbox.put(message(tokens(number, number)))
            await anyio.sleep(0.24)
        outbox.close()
    assert [len(parsed(data)) for data in sent] == [1, 4, 4, 1]
    assert [e.tokens.position for data in sent for e in parsed(data)] == list(range(10))


@simulated
async def test_a_full_outbox_pauses_its_reader_until_the_client_takes_something() -> None:
    outbox = Outbox(100)
    chunk = b"x" * 60
    await outbox.put(chunk)
    with anyio.move_on_after(5.0) as blocked:
        await outbox.put(chunk)
    assert blocked.cancelled_caught
    assert outbox.full
    received: list[bytes] = []

    async def sink(data: bytes) -> None:
        received.append(data)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outbox.drain_to, sink)
        await outbox.put(chunk)
        outbox.close()
    # The cursor counts it as delivered: a cancelled wait must not lose it.
    assert b"".join(received) == chunk * 3


@simulated
async def test_a_failure_is_told_only_after_everything_was_sent() -> None:
    outbox, sent = Outbox(1000), []

    async def sink(data: bytes) -> None:
        sent.append(data)

    await outbox.put(frame(tokens(1, 1)))
    failure = Unavailable("gone")
    outbox.close(failure)
    assert await outbox.drain_to(sink) is failure
    assert len(sent) == 1
