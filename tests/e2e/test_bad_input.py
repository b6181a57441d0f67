"""Bad input to every call: the right status, a reason, words that say what to do, nothing written,
and a session that takes turns afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.loop import run
from tests.support.bad_input import (
    OTHER_MODEL,
    ROWS,
    Code,
    Row,
    no_replica_of_its_model,
    way_to_text,
)
from tests.support.served_world import FLEET, REQUESTS, SESSIONS, Served, finished, served
from tests.support.situations import ABOUT, Case, check_usable, idle
from tests.support.wire import Answer

WITHOUT_TEXT = {"ListReplicas", "WatchFleet", "SetDraining"}


def test_every_call_has_its_rows() -> None:
    """A new call needs rows of its own: one beside what every call can get, unless nothing in its
    request can be wrong by itself."""
    assert {r.method for r in ROWS} == set(REQUESTS)
    assert len({r.id for r in ROWS}) == len(ROWS)
    own = {r.method for r in ROWS if not r.name.startswith(("bytes that are", "text that is"))}
    nothing_but_names = {
        "GetSession",
        "SuspendSession",
        "ResumeSession",
        "WatchSession",
        "ListReplicas",
        "StopTurn",
        "AbortHandOver",
        "ReleaseSession",
        "ReadTurns",
        "SetDraining",
    }
    assert set(REQUESTS) - own == nothing_but_names
    without_text = {n for n, kind in REQUESTS.items() if not way_to_text(kind.DESCRIPTOR)}
    assert without_text == WITHOUT_TEXT


@asynccontextmanager
async def fleet() -> AsyncIterator[Served]:
    """Two alike, one draining, one of another tokenizer, one of another model."""
    async with served("a", "b", "d") as made:
        made.world.other_tokens = frozenset({"t"})
        await made.world.start_replica("t")
        made.world.engine = replace(made.world.engine, model=OTHER_MODEL)
        await made.world.start_replica("m")
        draining = made.world.replicas["d"].ref
        assert draining is not None
        await made.world.store.set_draining(draining, True)
        await anyio.sleep(1.5)
        made.serve_replica(made.world.replicas["a"])
        yield made


@pytest.mark.parametrize("method", REQUESTS)
def test_bad_input_is_refused_with_what_to_do_and_leaves_the_session_usable(method: str) -> None:
    async def test() -> None:
        async with fleet() as made:
            for index, one in enumerate(r for r in ROWS if r.method == method):
                try:
                    await _try(made, one, f"{index}")
                except AssertionError as error:
                    raise AssertionError(f"{one.id}: {error}") from error

    run(test)


async def _try(made: Served, one: Row, name: str) -> None:
    case = await idle(made, f"row {name}")
    case.before = await made.session(case.session_id)
    if one.arrange is not None:
        await one.arrange(case)
    before = case.before = await made.session(case.session_id)
    answer = await made.call(one.method, one.build(case), case.tenant)
    answer.check()
    assert (answer.code, answer.reason) == (one.code, one.reason), answer
    assert one.says in f"{answer.message} {answer.hint}", answer
    after = await made.session(case.session_id)
    if before is not None and before.active_turn_id is not None:
        assert after is not None
        assert after.active_turn_id == before.active_turn_id
    else:
        assert after == before
    await _again_usable(case, one)


async def _again_usable(case: Case, one: Row) -> None:
    if one.arrange is no_replica_of_its_model:
        await case.served.world.start_replica("m")
        await anyio.sleep(1.5)
    await check_usable(case)


@pytest.mark.parametrize("role", ["USER", "TOOL"])
def test_a_message_without_content_is_input_all_the_same(role: str) -> None:
    """A tool may have nothing to say; the template marks where it says it."""

    async def test() -> None:
        async with served("a", "b") as made:
            case = await idle(made, "empty")
            before = await made.session(case.session_id)
            request = pb.RunTurnRequest(session_id=case.session_id, turn_id="second")
            request.messages.add(role=pb.Message.Role.Value(f"ROLE_{role}"))
            end = finished(await made.call("RunTurn", request))
            assert end.status == pb.TURN_STATUS_COMMITTED
            assert before is not None
            assert end.usage.input_tokens > before.head.length
            await check_usable(case)

    run(test)


@pytest.mark.parametrize("method", [*SESSIONS, *FLEET])
def test_a_call_whose_time_is_over_begins_nothing(method: str) -> None:
    async def test() -> None:
        async with served("a", "b") as made:
            case = await idle(made, "late")
            case.before = await made.session(case.session_id)
            build = ABOUT.get(method)
            request = REQUESTS[method]() if build is None else build(case)
            answer = await made.call(method, request, time_s=0.0)
            _check_late(answer)
            assert await made.session(case.session_id) == case.before
            await check_usable(case)

    run(test)


def _check_late(answer: Answer) -> None:
    answer.check()
    assert (answer.code, answer.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"), answer
    assert "allow more time" in answer.hint
