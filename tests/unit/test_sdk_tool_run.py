"""The loop of an agent with tools, against a gateway that plays a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import sessile
from sessile import (
    InvalidRequest,
    Priority,
    RoundEnded,
    Runtime,
    Sessile,
    Session,
    Tokens,
    ToolEnded,
    ToolFailed,
    ToolRoundsExceeded,
    ToolRunEvent,
    ToolStarted,
    TurnFailed,
    TurnStatus,
)
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from tests.support.fake_gateway import (
    Fail,
    FakeGateway,
    Hang,
    Step,
    accepted,
    finished,
    serving,
    tokens,
)

pytestmark = pytest.mark.anyio


async def no_wait(seconds: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[Sessile]:
    async with Sessile(gateway.target, runtime=Runtime(sleep=no_wait)) as opened:
        yield opened


@pytest.fixture
def session(client: Sessile) -> Session:
    return client.session("ses_a")


def asks(*calls: tuple[str, str], attached: bool = False) -> list[Step]:
    """A turn that asks for tools: (name, arguments) of each."""
    made = [
        pb.ToolCall(id=f"call_{index}", name=name, arguments_json=arguments)
        for index, (name, arguments) in enumerate(calls)
    ]
    return [accepted(attached=attached), tokens(0), finished(2, tool_calls=made)]


def answers(attached: bool = False) -> list[Step]:
    return [accepted(attached=attached), tokens(0), finished(2)]


def told(gateway: FakeGateway, turn: int = -1) -> list[str]:
    """What the model was told in a turn."""
    request = gateway.requests(pb.RunTurnRequest)[turn]
    return [message.content for message in request.messages]


@sessile.tool
def double(x: int) -> int:
    return 2 * x


@sessile.tool
async def broken(x: int) -> float:
    return 1 / x


async def test_a_run_goes_on_until_the_model_answers(
    gateway: FakeGateway, session: Session
) -> None:
    gateway.turns += [
        asks(("double", '{"x": 4}'), ("double", '{"x": 5}')),
        asks(("double", '{"x": 6}')),
        answers(),
    ]
    run = session.run_tools("Go.", tools=[double], run_id="job", max_tokens=7)
    events = [event async for event in run]
    result = await run.result()

    first, second, third = gateway.requests(pb.RunTurnRequest)
    assert [r.turn_id for r in (first, second, third)] == ["job.0", "job.1", "job.2"]
    assert {r.params.max_tokens for r in (first, second, third)} == {7}
    assert told(gateway, 0) == ["Go."]
    assert [(m.role, m.content, m.tool_call_id, m.name) for m in second.messages] == [
        (pb.Message.ROLE_TOOL, "8", "call_0", "double"),
        (pb.Message.ROLE_TOOL, "10", "call_1", "double"),
    ]
    assert told(gateway, 2) == ["12"]
    kinds = [type(event) for event in events]
    assert kinds.count(Tokens) == kinds.count(RoundEnded) == 3
    assert [e.round for e in events if isinstance(e, ToolStarted)] == [0, 0, 1]
    assert [e.output for e in result.calls] == ["8", "10", "12"]
    assert (len(result.turns), result.text, result.status) == (3, "a b ", TurnStatus.COMMITTED)


async def test_what_a_tool_does_wrong_is_told_to_the_model(
    gateway: FakeGateway, session: Session
) -> None:
    gateway.turns += [
        asks(
            ("broken", '{"x": 0}'),
            ("absent", "{}"),
            ("broken", '{"x": "one"}'),
            ("broken", "no json"),
            ("broken", "[1]"),
        ),
        answers(),
    ]
    result = await session.run_tools("Go.", tools=[broken, double]).result()
    said = [json.loads(text)["error"] for text in told(gateway)]
    assert said[0] == "ZeroDivisionError: division by zero"
    assert said[1] == "there is no tool 'absent'; there are: broken, double"
    assert "Expected `int`" in said[2]
    assert "Expecting value" in said[3]
    assert "no JSON object" in said[4]
    assert [call.error for call in result.calls] == said


async def test_an_error_is_raised_if_that_is_wanted_and_ends_the_other_tools(
    gateway: FakeGateway, session: Session
) -> None:
    ended = asyncio.Event()
    started = asyncio.Event()

    @sessile.tool
    async def long() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    @sessile.tool
    async def fails() -> None:
        await started.wait()
        raise OSError("no disk")

    gateway.turns.append(asks(("long", "{}"), ("fails", "{}")))
    run = session.run_tools("Go.", tools=[long, fails], on_tool_error="raise")
    with pytest.raises(ToolFailed, match="the tool fails failed: OSError: no disk") as caught:
        await run.result()
    assert isinstance(caught.value.__cause__, OSError)
    assert ended.is_set()


async def test_a_tool_that_takes_too_long_is_cancelled_and_told(
    gateway: FakeGateway, session: Session
) -> None:
    @sessile.tool
    async def endless() -> None:
        await asyncio.Event().wait()

    gateway.turns += [asks(("endless", "{}")), answers()]
    await session.run_tools("Go.", tools=[endless], tool_timeout_s=0.01).result()
    assert told(gateway) == ['{"error": "endless took longer than 0.01 s"}']


async def test_a_tool_that_cancels_itself_and_one_that_says_too_much_are_told(
    gateway: FakeGateway, session: Session
) -> None:
    @sessile.tool
    async def quits() -> None:
        raise asyncio.CancelledError

    @sessile.tool
    def talks() -> str:
        return "x" * ((1 << 20) + 1)

    gateway.turns += [asks(("quits", "{}"), ("talks", "{}")), answers()]
    await session.run_tools("Go.", tools=[quits, talks]).result()
    first, second = told(gateway)
    assert "CancelledError" in first
    assert "1048577 characters, 1048576 at most" in second


async def test_no_more_tools_run_at_once_than_allowed(
    gateway: FakeGateway, session: Session
) -> None:
    running, most = 0, 0

    @sessile.tool
    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    gateway.turns += [asks(*[("work", "{}")] * 7), answers()]
    result = await session.run_tools("Go.", tools=[work], max_parallel=3).result()
    assert (len(result.calls), most) == (7, 3)


async def test_the_last_round_is_shown_before_it_is_said_to_be_one_too_many(
    gateway: FakeGateway, session: Session
) -> None:
    gateway.turns += [asks(("double", '{"x": 1}'))] * 2
    events: list[ToolRunEvent] = []

    async def read() -> None:
        run = session.run_tools("Go.", tools=[double], max_rounds=2)
        while True:
            events.append(await anext(run))

    with pytest.raises(ToolRoundsExceeded, match="max_rounds") as caught:
        await read()
    assert [e.round for e in events if isinstance(e, RoundEnded)] == [0, 1]
    assert (len(caught.value.result.turns), len(caught.value.result.calls)) == (2, 1)


async def test_a_repeated_run_calls_no_tool_whose_result_the_session_has(
    gateway: FakeGateway, session: Session
) -> None:
    gateway.turns += [
        asks(("double", '{"x": 1}'), attached=True),
        asks(("double", '{"x": 2}'), attached=True),
        [Fail(errors.NotFound("no such turn"))],
        answers(),
    ]
    result = await session.run_tools("Go.", tools=[double], run_id="job").result()
    requests = gateway.requests(pb.RunTurnRequest)
    assert [(r.turn_id, r.attach_only) for r in requests] == [
        ("job.0", False),
        ("job.1", True),
        ("job.2", True),
        ("job.2", False),
    ]
    assert [call.output for call in result.calls] == ["4"]
    assert len(result.turns) == 3


async def test_all_turns_of_a_run_have_its_priority(gateway: FakeGateway, session: Session) -> None:
    gateway.turns += [
        asks(("double", '{"x": 1}'), attached=True),
        [Fail(errors.NotFound("no such turn"))],
        answers(),
    ]
    await session.run_tools("Go.", tools=[double], priority=Priority.BATCH).result()
    asked = [r.priority for r in gateway.requests(pb.RunTurnRequest)]
    assert asked == [pb.TURN_PRIORITY_BATCH] * 3


async def test_a_tool_knows_its_call(gateway: FakeGateway, session: Session) -> None:
    @sessile.tool
    def which() -> str:
        return sessile.current_call().id

    gateway.turns += [asks(("which", "{}"), ("which", "{}")), answers()]
    await session.run_tools("Go.", tools=[which]).result()
    assert told(gateway) == ["call_0", "call_1"]
    with pytest.raises(LookupError):
        sessile.current_call()


async def test_leaving_a_run_ends_its_tools_and_its_turn(
    gateway: FakeGateway, session: Session
) -> None:
    ended = asyncio.Event()

    @sessile.tool
    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    gateway.turns += [asks(("endless", "{}")), [accepted(), Hang()]]
    async with session.run_tools("Go.", tools=[endless]) as run:
        async for event in run:
            if isinstance(event, ToolStarted):
                break
    assert ended.is_set()
    assert [event async for event in run] == []

    async with session.run_tools("Go.", tools=[endless], run_id="job") as run:
        await anext(run)
    (cancel,) = gateway.requests(session_pb2.CancelTurnRequest)
    assert cancel.turn_id == "job.0"
    with pytest.raises(sessile.WrongState, match="abandoned"):
        await run.result()


async def test_turns_that_fail_or_are_cancelled_end_the_run(
    gateway: FakeGateway, session: Session
) -> None:
    calls = [pb.ToolCall(id="c", name="double", arguments_json='{"x": 1}')]
    for status in (pb.TURN_STATUS_CANCELLED, pb.TURN_STATUS_FAILED):
        gateway.turns.append([accepted(), tokens(0), finished(2, status, tool_calls=calls)])
    result = await session.run_tools("Go.", tools=[double]).result()
    assert (result.status, result.calls) == (TurnStatus.CANCELLED, ())
    with pytest.raises(TurnFailed):
        await session.run_tools("Go.", tools=[double]).result()


async def test_tools_given_to_open_are_those_of_its_runs(
    gateway: FakeGateway, client: Sessile
) -> None:
    opened = session_pb2.Session(session_id="ses_b", model="m")
    gateway.answers.append(session_pb2.OpenSessionResponse(session=opened))
    gateway.turns += [asks(("double", '{"x": 3}')), answers()]
    session = await client.open(tools=[double])
    events = [event async for event in session.run_tools("Go.")]
    assert [e.output for e in events if isinstance(e, ToolEnded)] == ["6"]
    assert gateway.seen[0].tools[0].name == "double"
    with pytest.raises(InvalidRequest, match="opened without the tool broken"):
        session.run_tools("Go.", tools=[broken])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tools": []}, "no tools"),
        ({}, "no tools"),
        ({"tools": [double, double]}, "two tools are called double"),
        ({"tools": [sessile.Tool("t")]}, "has no function"),
        ({"tools": [double], "max_rounds": 0}, "at least 1"),
        ({"tools": [double], "tool_timeout_s": 0.0}, "positive"),
        ({"tools": [double], "on_tool_error": "ignore"}, '"tell" or "raise"'),
    ],
)
async def test_a_run_that_cannot_work_is_refused_before_anything_is_sent(
    session: Session, options: dict[str, object], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        session.run_tools("Go.", **options)  # type: ignore[arg-type]
