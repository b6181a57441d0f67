"""The text of a turn alone: all of it, and errors and abandonment as of the turn itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from sessile import Sessile, TurnFailed, sync
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.fake_gateway import (
    FakeGateway,
    Hang,
    accepted,
    finished,
    gateway_in_a_thread,
    serving,
    tokens,
)

pytestmark = pytest.mark.anyio


def held_back() -> pb.TurnEvent:
    """An end with a piece of text that no token released."""
    event = finished(2, text="end", text_offset=4)
    event.finished.text_end += len("end")
    return event


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


async def test_every_piece_comes_with_what_was_held_back(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), tokens(0, 1), tokens(1, 1), held_back()])
    async with Sessile(gateway.target) as client:
        turn = client.session("ses_a").run("Go.")
        assert [text async for text in turn.text_stream()] == ["a ", "b ", "end"]
        assert (await turn.result()).text == turn.text == "a b end"


async def test_a_failed_turn_raises_after_its_text(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), tokens(0), finished(2, pb.TURN_STATUS_FAILED)])
    seen: list[str] = []

    async def read(client: Sessile) -> None:
        stream = client.session("ses_a").run("Go.").text_stream()
        while True:
            seen.append(await anext(stream))

    async with Sessile(gateway.target) as client:
        with pytest.raises(TurnFailed):
            await read(client)
    assert seen == ["a b "]


async def test_leaving_the_stream_abandons_the_turn(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), tokens(0), Hang()])
    async with Sessile(gateway.target) as client:
        turn = client.session("ses_a").run("Go.", turn_id="t1")
        async with aclosing(turn.text_stream()) as stream:
            assert await anext(stream) == "a b "
    (cancel,) = gateway.requests(session_pb2.CancelTurnRequest)
    assert cancel.turn_id == "t1"


def test_without_an_event_loop_too() -> None:
    with gateway_in_a_thread() as gateway, sync.Sessile(gateway.target) as client:
        gateway.turns.append([accepted(), tokens(0), held_back()])
        assert list(client.session("ses_a").run("Go.").text_stream()) == ["a b ", "end"]
