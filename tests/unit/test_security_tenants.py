"""A foreign tenant's session is one that does not exist: same answer, same work, for every RPC."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.gateway_world import simulated
from tests.support.served_world import SESSIONS, STRANGER, TENANT, Served, served, turn_request
from tests.support.wire import Answer

UNKNOWN = "unknown"

REQUESTS: dict[str, Callable[[str], Message]] = {
    "GetSession": lambda it: session_pb2.GetSessionRequest(session_id=it),
    "RunTurn": lambda it: turn_request(it, "t9"),
    "CancelTurn": lambda it: session_pb2.CancelTurnRequest(session_id=it, turn_id="t1"),
    "ForkSession": lambda it: session_pb2.ForkSessionRequest(session_id=it, request_id="f"),
    "SuspendSession": lambda it: session_pb2.SuspendSessionRequest(session_id=it),
    "ResumeSession": lambda it: session_pb2.ResumeSessionRequest(session_id=it),
    "CloseSession": lambda it: session_pb2.CloseSessionRequest(session_id=it, purge=True),
    "GetTranscript": lambda it: session_pb2.GetTranscriptRequest(session_id=it),
    "WatchSession": lambda it: session_pb2.WatchSessionRequest(session_id=it),
}
"""RPC -> its request about a session."""
WITHOUT_A_SESSION = {"OpenSession", "ListSessions"}
BACKGROUND = {"fleet", "acquire_lease", "renew_lease", "expired_turns", "heartbeat"}
"""Calls that gateways make by themselves all the time."""


def counted(store: Any) -> list[str]:
    """Names of the store's calls from now on."""
    calls: list[str] = []
    for name, method in inspect.getmembers(store, inspect.iscoroutinefunction):
        if name.startswith("_"):
            continue

        async def call(*given: Any, _name: str = name, _method: Any = method, **more: Any) -> Any:
            if _name not in BACKGROUND:
                calls.append(_name)
            return await _method(*given, **more)

        setattr(store, name, call)
    return calls


def said(answer: Answer, session_id: str) -> tuple[Any, ...]:
    """All that a caller gets, with the id that it sent taken out."""
    trailers = [part.replace(session_id.encode(), b"?") for part in answer.trailing]
    shown = answer.message.replace(session_id, "?")
    return answer.code, shown, answer.reason, answer.hint, trailers, answer.responses, answer.left


async def a_session(it: Served, state: str) -> str:
    session_id = await it.open(f"of-{state}")
    (await it.turn(session_id, "t1")).check()
    calls = {
        "suspended": ("SuspendSession", session_pb2.SuspendSessionRequest),
        "closed": ("CloseSession", session_pb2.CloseSessionRequest),
    }
    if state in calls:
        method, request = calls[state]
        (await it.call(method, request(session_id=session_id))).check()
    return session_id


def test_every_rpc_of_sessions_is_in_the_table() -> None:
    assert set(REQUESTS) | WITHOUT_A_SESSION == set(SESSIONS)
    for method, request in REQUESTS.items():
        assert type(request("x")) is SESSIONS[method]


@pytest.mark.parametrize("state", ["open", "suspended", "closed"])
def test_a_foreign_session_is_an_unknown_one(state: str) -> None:
    @simulated
    async def run() -> None:
        async with served("r1") as it:
            foreign = await a_session(it, state)
            unknown = foreign[:-4] + ("aaaa" if foreign[-4:] != "aaaa" else "bbbb")
            await it.open("own", STRANGER)  # the stranger's salt is known, as ours is
            calls = counted(it.app.store)
            for method, request in REQUESTS.items():
                answers, works = [], []
                # Each several times: what is cached must not tell them apart either.
                for session_id in (unknown, foreign) * 2:
                    calls.clear()
                    answer = await it.call(method, request(session_id), STRANGER)
                    answers.append(said(answer, session_id))
                    works.append(list(calls))
                assert answers[0][0] is grpc.StatusCode.NOT_FOUND, method
                assert answers[0][2] == "SESSION_NOT_FOUND"
                assert answers == [answers[0]] * 4, method
                assert works == [works[0]] * 4, method
                assert works[0], f"{method} did not ask the store"
            mine = await it.session(foreign)
            assert mine is not None
            assert mine.state.lower() == state
            assert mine.active_turn_id is None

    run()


@simulated
async def test_lists_have_the_tenants_own_sessions_only() -> None:
    async with served("r1") as it:
        ours = await it.open("a")
        theirs = await it.open("a", STRANGER)
        assert ours != theirs, "one request id of two tenants makes two sessions"
        for tenant, own in ((TENANT, ours), (STRANGER, theirs)):
            answer = await it.call("ListSessions", session_pb2.ListSessionsRequest(), tenant)
            listed = session_pb2.ListSessionsResponse.FromString(answer.responses[0])
            assert [session.session_id for session in listed.sessions] == [own]


@simulated
async def test_equal_prompts_of_two_tenants_share_no_cache() -> None:
    async with served("r1") as it:
        cached: list[int] = []
        for tenant in (TENANT, TENANT, STRANGER):
            session_id = await it.open(f"s{len(cached)}", tenant)
            request = turn_request(session_id, "t1")
            request.messages[0].content = "the same long question " * 40
            answer = await it.call("RunTurn", request, tenant)
            events = pb.TurnStream.FromString(b"".join(answer.responses)).events
            cached.append(events[-1].finished.usage.cached_tokens)
        assert cached[0] == 0
        assert cached[1] > 500, "the tenant's own second session finds the pages"
        assert cached[2] == 0, "another tenant's finds nothing, whatever it guesses"
