"""A turn as the client reads it: over reconnections, refusals, cancels and abandonment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import grpc
import pytest
from sessile import (
    Accepted,
    DataLoss,
    FinishReason,
    Message,
    Moved,
    NotFound,
    Overloaded,
    Position,
    ProtocolError,
    RetryPolicy,
    Runtime,
    Sessile,
    StaleClient,
    Tokens,
    ToolCall,
    TurnFailed,
    TurnStatus,
    Unavailable,
    WrongState,
)
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from tests.support.fake_gateway import (
    OUTPUT_START,
    Cut,
    Fail,
    FakeGateway,
    Hang,
    Step,
    accepted,
    digest,
    finished,
    place,
    serving,
    session,
    tokens,
    word,
)

pytestmark = pytest.mark.anyio


class FirstGateway(random.Random):
    """Starts at the first gateway and waits the longest of each range."""

    def randrange(self, *args: object, **kwargs: object) -> int:
        return 0

    def uniform(self, a: float, b: float) -> float:
        return b


class Naps:
    """Sleeps at once and remembers for how long it should have."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        await asyncio.sleep(0)


def runtime(naps: Naps | None = None) -> Runtime:
    return Runtime(sleep=naps or Naps(), rng=FirstGateway())


@asynccontextmanager
async def client_of(
    *gateways: FakeGateway, naps: Naps | None = None, retry: RetryPolicy | None = None
) -> AsyncIterator[Sessile]:
    targets = [gateway.target for gateway in gateways]
    async with Sessile(targets, tenant="acme", runtime=runtime(naps), retry=retry) as client:
        yield client


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


@pytest.fixture
async def other(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


WHOLE = (accepted(), tokens(0), tokens(2), finished(4))
TEXT = "".join(word(i) for i in range(4))


async def test_a_turn_gives_its_events_then_its_result(gateway: FakeGateway) -> None:
    gateway.turns.append(WHOLE)
    async with client_of(gateway) as client:
        turn = client.session("ses_a").run("hi", turn_id="t1", max_tokens=8, stop=["x"])
        events = [event async for event in turn]
        result = await turn.result()
    assert [type(event).__name__ for event in events] == [
        "Accepted",
        "Tokens",
        "Tokens",
        "Finished",
    ]
    assert result.text == TEXT
    assert result.token_ids == (100, 101, 102, 103)
    assert result.finish_reason is FinishReason.STOP
    assert result.usage.cached_tokens == 4
    assert result.end == Position(OUTPUT_START + 4, digest(OUTPUT_START + 4))
    assert result.ttft_ms is not None
    assert result.reconnects == 0
    (request,) = gateway.requests(pb.RunTurnRequest)
    assert request.messages == [pb.Message(role=pb.Message.ROLE_USER, content="hi")]
    assert (request.params.max_tokens, list(request.params.stop)) == (8, ["x"])
    assert gateway.tenants == ["acme"]


async def test_a_cut_stream_goes_on_at_the_next_gateway_after_the_last_token(
    gateway: FakeGateway, other: FakeGateway
) -> None:
    gateway.turns.append([accepted(), tokens(0), Cut()])
    other.turns.append([accepted("r2", attempt=2, attached=True), tokens(2), finished(4)])
    naps = Naps()
    async with client_of(gateway, other, naps=naps) as client:
        turn = client.session("ses_a").run("hi", turn_id="t1")
        events = [event async for event in turn]
        result = await turn.result()
    assert result.text == TEXT
    assert (result.reconnects, result.moves) == (1, 1)
    assert naps.taken == []  # an untried gateway is asked at once
    assert sum(isinstance(event, Accepted) for event in events) == 1
    assert sum(isinstance(event, Moved) for event in events) == 1
    (again,) = other.requests(pb.RunTurnRequest)
    assert again.resume_from == place(OUTPUT_START + 2)
    assert again.attach_only
    assert not again.messages


async def test_a_stream_that_just_ends_is_taken_up_again(gateway: FakeGateway) -> None:
    gateway.turns += [[accepted(), tokens(0)], [accepted(attached=True), tokens(2), finished(4)]]
    async with client_of(gateway) as client:
        result = await client.session("ses_a").run("hi").result()
    assert result.text == TEXT


async def test_a_turn_not_accepted_yet_is_repeated_unchanged(
    gateway: FakeGateway, other: FakeGateway
) -> None:
    gateway.turns.append([Cut()])
    other.turns.append(WHOLE)
    async with client_of(gateway, other) as client:
        await client.session("ses_a").run("hi").result()
    assert gateway.seen == other.seen


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([accepted(), tokens(0), tokens(3), finished(5)], id="gap"),
        pytest.param([accepted(), tokens(0), tokens(1), finished(3)], id="repeat"),
        pytest.param([accepted(), tokens(0), finished(4)], id="missing tail"),
        pytest.param([tokens(0)], id="tokens before accepted"),
        pytest.param([accepted(), accepted()], id="accepted twice"),
    ],
)
async def test_a_stream_that_is_not_contiguous_is_refused(
    gateway: FakeGateway, bad: list[pb.TurnEvent]
) -> None:
    gateway.turns.append([*bad])
    async with client_of(gateway) as client:
        turn = client.session("ses_a").run("hi")
        with pytest.raises(ProtocolError):
            await turn.result()


async def test_a_gap_between_two_connections_is_refused(gateway: FakeGateway) -> None:
    gateway.turns += [[accepted(), tokens(0), Cut()], [accepted(), tokens(3), finished(5)]]
    async with client_of(gateway) as client:
        with pytest.raises(ProtocolError, match="gap"):
            await client.session("ses_a").run("hi").result()


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([accepted(), finished(1)], id="the ledger is shorter"),
        pytest.param(
            [accepted(output_start=pb.Position(length=OUTPUT_START, digest=b"other"))],
            id="another history",
        ),
        pytest.param([Fail(errors.DataLoss("lost"))], id="the server says so"),
        pytest.param([Fail(errors.NotFound("?", reason="TURN_NOT_FOUND"))], id="the turn is gone"),
    ],
)
async def test_a_ledger_that_lost_what_was_received_is_data_loss(
    gateway: FakeGateway, after: list[pb.TurnEvent]
) -> None:
    gateway.turns += [[accepted(), tokens(0), Cut()], [*after]]
    async with client_of(gateway) as client:
        with pytest.raises(DataLoss):
            await client.session("ses_a").run("hi").result()


async def test_the_servers_retry_delay_is_the_least_that_is_waited(gateway: FakeGateway) -> None:
    busy = Fail(errors.Overloaded("busy", retry_after_ms=700))
    gateway.turns += [[busy], [busy], WHOLE]
    naps = Naps()
    async with client_of(gateway, naps=naps) as client:
        await client.session("ses_a").run("hi").result()
    assert naps.taken == pytest.approx([0.75, 0.8])


async def test_tries_are_bounded_and_progress_renews_them(gateway: FakeGateway) -> None:
    cut: list[Step] = [accepted(), tokens(0), Cut()]
    gateway.turns += [cut, [Cut()], [accepted(), tokens(2), Cut()], [Cut()], [Cut()], [Cut()]]
    naps = Naps()
    async with client_of(gateway, naps=naps, retry=RetryPolicy(3, 0.1, 0.15)) as client:
        turn = client.session("ses_a").run("hi", turn_id="t1")
        with pytest.raises(Unavailable):
            await turn.result()
    assert turn.text == TEXT
    assert naps.taken == pytest.approx([0.1, 0.15, 0.1, 0.15])
    assert len(gateway.turns) == 1


async def test_a_wait_longer_than_the_time_left_is_not_begun(gateway: FakeGateway) -> None:
    gateway.turns.append([Fail(errors.Overloaded("busy", retry_after_ms=60_000))])
    async with client_of(gateway) as client:
        with pytest.raises(Overloaded) as caught:
            await client.session("ses_a").run("hi", timeout_s=5).result()
    assert caught.value.retry_after_s == 60
    assert gateway.requests(pb.RunTurnRequest)[0].timeout_ms == 5000


async def test_what_a_repeat_cannot_help_is_not_repeated(gateway: FakeGateway) -> None:
    gateway.turns.append([Fail(errors.StaleClient("moved on"))])
    async with client_of(gateway) as client:
        with pytest.raises(StaleClient) as caught:
            await client.session("ses_a").run("hi").result()
    assert caught.value.hint


async def test_each_turn_carries_where_the_last_one_ended(gateway: FakeGateway) -> None:
    gateway.answers.append(
        session_pb2.OpenSessionResponse(session=session(head=pb.Position(digest=b"root")))
    )
    gateway.turns += [WHOLE, [accepted(), Hang()], WHOLE]
    async with client_of(gateway) as client:
        handle = await client.open(system="s")
        await handle.run("one").result()
        async with handle.run("two") as turn:
            await anext(turn)
        await handle.run("three").result()
    first, second, third = gateway.requests(pb.RunTurnRequest)
    assert first.precondition == pb.Precondition(head=pb.Position(digest=b"root"))
    assert second.precondition == pb.Precondition(head=place(OUTPUT_START + 4), turn_index=1)
    assert not third.HasField("precondition")  # the end of an abandoned turn was not seen


async def test_replaying_an_old_turn_teaches_nothing_about_the_head(gateway: FakeGateway) -> None:
    replay = [accepted(attached=True), tokens(0), finished(2)]
    later = [accepted(turn_index=4), tokens(0), tokens(2), finished(4)]
    gateway.turns += [replay, later, replay]
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        await handle.attach("t0").result()
        assert handle.head is None
        await handle.run("on").result()
        await handle.attach("t0").result()
        assert handle.head is not None
        assert handle.head.length == OUTPUT_START + 4


async def test_cancel_ends_the_stream_with_what_there_is(gateway: FakeGateway) -> None:
    cancelled = finished(2, pb.TURN_STATUS_CANCELLED, reason=pb.FINISH_REASON_CANCELLED)
    gateway.turns.append([accepted(), tokens(0), Hang(), cancelled])
    async with client_of(gateway) as client:
        turn = client.session("ses_a").run("hi", turn_id="t1")
        await anext(turn)
        assert await turn.cancel() is TurnStatus.CANCELLED
        result = await turn.result()
    assert (result.status, result.text) == (TurnStatus.CANCELLED, "a b ")


async def test_a_cancelled_reader_cancels_the_turn(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), Hang()])
    async with client_of(gateway) as client:
        task = asyncio.create_task(client.session("ses_a").run("hi", turn_id="t1").result())
        await gateway.hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (cancel,) = gateway.requests(session_pb2.CancelTurnRequest)
    assert (cancel.session_id, cancel.turn_id) == ("ses_a", "t1")


async def test_a_cancel_scope_around_the_client_still_cancels_the_turn(
    gateway: FakeGateway,
) -> None:
    """AnyIO cancels again at every await of the scope, clean-up included."""
    gateway.turns.append([accepted(), Hang()])
    with anyio.CancelScope() as scope:
        async with client_of(gateway) as client, anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await gateway.hanging.wait()
                scope.cancel()

            tasks.start_soon(give_up)
            await client.session("ses_a").run("hi", turn_id="t1").result()
    assert scope.cancelled_caught
    await asyncio.wait_for(gateway.cancelled.wait(), 5)


async def test_a_reader_that_detaches_leaves_the_turn_running(gateway: FakeGateway) -> None:
    gateway.turns += [
        [accepted(), tokens(0), Hang()],
        [accepted(attached=True), tokens(2), finished(4)],
    ]
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        async with handle.run("hi", turn_id="t1", on_abandon="detach") as turn:
            async for event in turn:
                if isinstance(event, Tokens):
                    break
        await asyncio.wait_for(gateway.ended.wait(), 30)
        with pytest.raises(WrongState):
            await turn.result()
        rest = await handle.attach("t1", resume_from=turn.position).result()
    assert not gateway.requests(session_pb2.CancelTurnRequest)
    assert gateway.seen[-1].resume_from == place(OUTPUT_START + 2)
    assert rest.text == "c d "


async def test_no_task_is_left_behind(gateway: FakeGateway) -> None:
    gateway.turns += [[accepted(), Hang()], [accepted(), Hang()], WHOLE]
    before = len(asyncio.all_tasks())
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        for on_abandon in ("cancel", "detach"):
            async with handle.run("hi", on_abandon=on_abandon) as turn:
                await anext(turn)
        await handle.run("hi").result()
    async with asyncio.timeout(30):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_a_failed_turn_raises_with_its_result(gateway: FakeGateway) -> None:
    failed = finished(2, pb.TURN_STATUS_FAILED, reason=pb.FINISH_REASON_DEADLINE, error="too slow")
    gateway.turns.append([accepted(), tokens(0), failed])
    async with client_of(gateway) as client:
        with pytest.raises(TurnFailed, match="too slow") as caught:
            await client.session("ses_a").run("hi").result()
    assert caught.value.result.text == "a b "
    assert caught.value.result.finish_reason is FinishReason.DEADLINE


async def test_attaching_to_an_unknown_turn_is_not_found(gateway: FakeGateway) -> None:
    gateway.turns.append([Fail(errors.NotFound("no turn", reason="TURN_NOT_FOUND"))])
    async with client_of(gateway) as client:
        with pytest.raises(NotFound):
            await client.session("ses_a").attach("t9").result()
    assert gateway.seen[0].attach_only


async def test_tool_results_answer_their_call(gateway: FakeGateway) -> None:
    call = pb.ToolCall(id="c1", name="add", arguments_json='{"a": 1}')
    done = finished(2, reason=pb.FINISH_REASON_TOOL_CALLS, tool_calls=[call])
    gateway.turns += [[accepted(), tokens(0), done], WHOLE]
    async with client_of(gateway) as client:
        handle = client.session("ses_a")
        (asked,) = (await handle.run("hi").result()).tool_calls
        assert asked == ToolCall("c1", "add", '{"a": 1}')
        assert asked.arguments == {"a": 1}
        await handle.run(Message.tool(asked, {"sum": 2})).result()
    (message,) = gateway.seen[1].messages
    assert message == pb.Message(
        role=pb.Message.ROLE_TOOL, content='{"sum": 2}', tool_call_id="c1", name="add"
    )


async def test_unknown_events_are_skipped(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), pb.TurnEvent(), tokens(0), finished(2)])
    async with client_of(gateway) as client:
        assert (await client.session("ses_a").run("hi").result()).text == "a b "


async def test_a_dead_gateway_among_several_is_passed_over(gateway: FakeGateway) -> None:
    gateway.turns.append(WHOLE)
    targets = ["127.0.0.1:1", gateway.target]
    async with Sessile(targets, runtime=runtime()) as client:
        assert (await client.session("ses_a").run("hi").result()).text == TEXT


async def test_a_stream_cut_by_the_server_going_away_is_retried(gateway: FakeGateway) -> None:
    gateway.turns += [[Cut(grpc.StatusCode.CANCELLED)], WHOLE]
    async with client_of(gateway) as client:
        assert (await client.session("ses_a").run("hi").result()).text == TEXT
