"""A gateway that lies: the client ends with a typed error, and never takes a stream with a defect
for a whole turn."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import grpc
import pytest
from grpc import aio
from hypothesis import given
from sessile import RetryPolicy, Sessile, SessileError, TurnStatus
from sessile.events import TurnFold
from sessile.records import Position
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz
from tests.support.fake_gateway import OUTPUT_START, accepted, finished, place, tokens

COUNT = 12


def honest(draw: random.Random) -> list[pb.TurnEvent]:
    """A turn of COUNT tokens, cut anywhere."""
    events, at = [accepted()], 0
    while at < COUNT:
        size = min(draw.randrange(1, 5), COUNT - at)
        events.append(tokens(at, size))
        at += size
    return [*events, finished(COUNT)]


def spoil(hostile: Hostile, events: list[pb.TurnEvent]) -> list[pb.TurnEvent]:
    """Events lost, repeated, swapped, made up, or with hostile fields."""
    draw, spoilt = hostile.draw, list(events)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(spoilt)) if spoilt else 0
        match draw.choice(("lose", "repeat", "swap", "make up", "merge", "edit", "none")):
            case "lose":
                del spoilt[at : at + 1]
            case "repeat":
                spoilt[at:at] = spoilt[at : at + 1]
            case "swap" if len(spoilt) > 1:
                other = draw.randrange(len(spoilt))
                spoilt[at], spoilt[other] = spoilt[other], spoilt[at]
            case "make up":
                spoilt.insert(at, hostile.message(pb.TurnEvent))
            case "merge" if spoilt:
                merged = pb.TurnEvent()
                merged.CopyFrom(spoilt[at])
                merged.MergeFrom(hostile.message(pb.TurnEvent))
                spoilt[at] = merged
            case "edit" if spoilt:
                spoilt[at] = _edited(hostile, spoilt[at])
            case _:
                pass
    return spoilt


def _edited(hostile: Hostile, event: pb.TurnEvent) -> pb.TurnEvent:
    edited = pb.TurnEvent()
    edited.CopyFrom(event)
    if edited.HasField("tokens"):
        match hostile.draw.randrange(4):
            case 0:
                moved = edited.tokens.position + hostile.draw.choice((1, 2, 2**40))
                edited.tokens.position = moved % 2**64
            case 1:
                del edited.tokens.token_ids[-1:]
            case 2:
                edited.tokens.token_ids.append(7)
            case _:
                edited.tokens.text_offset ^= 1
    elif edited.HasField("finished"):
        moved = edited.finished.end.length + hostile.draw.choice((1, 5))
        edited.finished.end.length = moved % 2**64
    elif edited.HasField("accepted"):
        edited.accepted.output_start.length ^= 1
    return edited


def check_whole(fold: TurnFold, start: int) -> None:
    """If this was taken for a result, it is one."""
    assert fold.finished is not None
    assert fold.accepted is not None, "finished without ever being accepted"
    if fold.finished.status is TurnStatus.COMMITTED:
        assert start + len(fold.token_ids) == fold.finished.end.length
        assert fold.at is not None
        assert not fold.at.contradicts(fold.finished.end)


@fuzz(600)
@given(seeds)
def test_a_spoilt_stream_is_a_typed_error_or_no_spoilt_turn(seed: int) -> None:
    hostile = Hostile(seed)
    start = Position(OUTPUT_START + 3, place(OUTPUT_START + 3).digest)
    resumed = hostile.draw.random() < 0.3
    fold = TurnFold(start if resumed else None)
    events = honest(hostile.draw)
    if resumed:
        events = [accepted(), tokens(3, COUNT - 3), finished(COUNT)]
    try:
        for event in spoil(hostile, events):
            if hostile.draw.random() < 0.1:
                fold.reconnected()
            fold.take(event)
    except SessileError:
        return
    if fold.finished is not None and fold.accepted is not None:
        check_whole(fold, start.length if resumed else fold.accepted.output_start.length)


def test_a_turn_that_finishes_before_it_was_accepted_is_an_error() -> None:
    fold = TurnFold(None)
    with pytest.raises(SessileError):
        fold.take(finished(0))


@pytest.mark.parametrize("status", [pb.TURN_STATUS_UNSPECIFIED, pb.TURN_STATUS_RUNNING, 77])
def test_a_turn_that_finishes_without_having_ended_is_an_error(status: Any) -> None:
    """With such a status no gap would be noticed."""
    fold = TurnFold(None)
    fold.take(accepted())
    with pytest.raises(SessileError):
        fold.take(finished(5, status))


def test_a_position_that_no_ledger_can_have_is_an_error() -> None:
    """It could not be sent back as ``resume_from``."""
    fold = TurnFold(None)
    fold.take(accepted(output_start=pb.Position(length=2**64 - 1)))
    event = pb.TurnTokens(position=2**64 - 1, token_ids=[1, 2], digest=bytes(16))
    with pytest.raises(SessileError):
        fold.take(pb.TurnEvent(tokens=event))


# -- over the wire ---------------------------------------------------------------------------------


class Liar:
    """A server of the agent API that answers RunTurn with the bytes it is given."""

    def __init__(self) -> None:
        self.streams: list[list[bytes]] = []

    async def run_turn(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        del request, context
        for chunk in self.streams.pop(0) if self.streams else []:
            yield chunk

    async def unary(self, request: bytes, context: Any) -> bytes:
        del request, context
        return session_pb2.GetSessionResponse(
            session=session_pb2.Session(
                session_id="ses_a", model="m", state=session_pb2.SESSION_STATE_OPEN
            )
        ).SerializeToString()

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        if call.method.endswith("/RunTurn"):
            return grpc.unary_stream_rpc_method_handler(self.run_turn)
        return grpc.unary_unary_rpc_method_handler(self.unary)


@asynccontextmanager
async def lying() -> AsyncIterator[tuple[Liar, str]]:
    server, liar = aio.server(), Liar()
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_generic_rpc_handlers((liar,))  # type: ignore[arg-type]
    await server.start()
    try:
        yield liar, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def lies(seed: int) -> list[list[bytes]]:
    """Streams of one turn, one for each time that the client asks again."""
    hostile = Hostile(seed)
    draw, streams = hostile.draw, []
    for _ in range(draw.randrange(1, 4)):
        events = spoil(hostile, honest(draw))
        chunks = [pb.TurnStream(events=[event]).SerializeToString() for event in events]
        if draw.random() < 0.5 and chunks:
            at = draw.randrange(len(chunks))
            chunks[at] = hostile.damage(chunks[at])
        streams.append(chunks)
    return streams


async def _read(streams: list[list[bytes]]) -> Exception | None:
    """What reading the turn ends with."""
    async with lying() as (liar, address):
        liar.streams = streams
        policy = RetryPolicy(max_attempts=3, initial_s=0.001, max_s=0.002)
        async with Sessile(address, retry=policy) as client:
            turn = client.session("ses_a").run("Hi", on_abandon="detach")
            try:
                with anyio.fail_after(20):
                    result = await turn.result()
            except Exception as error:  # noqa: BLE001 - judged by the caller
                return error
            assert result.end.length == OUTPUT_START + len(result.token_ids) or (
                result.status is not TurnStatus.COMMITTED
            )
            return None


@fuzz(60)
@given(seeds)
def test_a_lying_gateway_gets_a_typed_error(seed: int) -> None:
    ended = anyio.run(_read, lies(seed))
    assert ended is None or isinstance(ended, SessileError), repr(ended)


def test_bytes_that_are_no_message_are_a_typed_error() -> None:
    ended = anyio.run(_read, [[b"\xff\xff\xff"]])
    assert isinstance(ended, SessileError), repr(ended)
