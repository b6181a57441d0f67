"""Bad input to the calls about sessions."""

from __future__ import annotations

from typing import Any

from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.bad_input.rows import (
    LONG,
    PARAMS,
    SYSTEM,
    USER,
    Code,
    changed,
    message,
    opening,
    row,
)
from tests.support.situations import Case

for what, (given, told) in PARAMS.items():
    params = pb.SamplingParams(**given)
    row("OpenSession", what, opening(default_params=params), told)


async def opened_before(case: Case) -> None:
    (await case.served.call("OpenSession", opening(labels={"job": "1"})(case))).check()


def tool(name: str = "t", parameters: str = "{}") -> pb.ToolDefinition:
    return pb.ToolDefinition(name=name, parameters_json=parameters)


OPENING: dict[str, tuple[dict[str, Any], str]] = {
    "no request id": ({"request_id": ""}, "1 to 128 characters"),
    "a long request id": ({"request_id": LONG}, "1 to 128 characters"),
    "no model where there are two": ({"model": ""}, "name a model"),
    "a role not set": ({"messages": [message(0)]}, "every message needs a role"),
    "a role of the future": ({"messages": [message(99)]}, "every message needs a role"),
    "two system messages": (
        {"messages": [message(SYSTEM), message(SYSTEM)]},
        "Join the instructions",
    ),
    "a late system message": (
        {"messages": [message(USER), message(SYSTEM)]},
        "a session's first message",
    ),
    "a tool without a name": ({"tools": [tool("")]}, "tools have names of their own"),
    "two tools of one name": ({"tools": [tool(), tool()]}, "tools have names of their own"),
    "a tool's parameters no JSON": ({"tools": [tool("t", "{")]}, "must be a JSON object"),
    "a tool's parameters a list": ({"tools": [tool("t", "[]")]}, "must be a JSON object"),
    "33 labels": ({"labels": {str(i): "" for i in range(33)}}, "at most 32 labels"),
    "a long label": ({"labels": {"a": LONG}}, "labels have at most 128 characters"),
    "leading messages over 4 MiB": (
        {"messages": [message(SYSTEM, "x" * (4 << 20))]},
        "at most 4194304 bytes",
    ),
}
for what, (given, told) in OPENING.items():
    row("OpenSession", what, opening(**given), told)
row(
    "OpenSession",
    "a model nobody serves",
    opening(model="gone"),
    "Use one of: another, sim",
    Code.NOT_FOUND,
    "MODEL_NOT_FOUND",
)
row(
    "OpenSession",
    "a request id used with other content",
    opening(labels={"job": "2"}),
    "Use a new request id",
    Code.ALREADY_EXISTS,
    "REQUEST_ID_REUSED",
    opened_before,
)
for page_size in (1001, 2**32 - 1):
    row(
        "ListSessions",
        f"a page of {page_size}",
        lambda _, n=page_size: session_pb2.ListSessionsRequest(page_size=n),  # type: ignore[misc]
        "page_size is at most 1000",
    )
row(
    "ListSessions",
    "a page token of nobody's",
    lambda _: session_pb2.ListSessionsRequest(page_token="page 2"),
    "none that a list gave",
)


async def forked_before(case: Case) -> None:
    (await case.served.call("ForkSession", changed("ForkSession", at_turn_index=1)(case))).check()


row(
    "ForkSession",
    "past the end",
    changed("ForkSession", at_turn_index=2),
    "has 1 ended turns, it cannot be forked after 2",
    Code.OUT_OF_RANGE,
    "OUT_OF_RANGE",
)
row(
    "ForkSession",
    "far past the end",
    changed("ForkSession", at_turn_index=2**64 - 1),
    "Fork after at most as many turns",
    Code.OUT_OF_RANGE,
    "OUT_OF_RANGE",
)
row(
    "ForkSession",
    "a request id used for another place",
    changed("ForkSession", at_turn_index=0),
    "Use a new request id for a new fork",
    Code.ALREADY_EXISTS,
    "REQUEST_ID_REUSED",
    forked_before,
)
row(
    "ForkSession",
    "a request id used with other labels",
    changed("ForkSession", labels={"a": "b"}),
    "Use a new request id for a new fork",
    Code.ALREADY_EXISTS,
    "REQUEST_ID_REUSED",
    forked_before,
)
row(
    "ForkSession",
    "no request id",
    lambda c: session_pb2.ForkSessionRequest(session_id=c.session_id),
    "1 to 128 characters",
)
row("ForkSession", "a long label", changed("ForkSession", labels={LONG: ""}), "at most 128")
row(
    "CloseSession",
    "kept for too long",
    changed("CloseSession", retention_ms=2**63),
    "retention_ms is at most 2592000000",
)
row(
    "GetTranscript",
    "a page of 1001",
    changed("GetTranscript", max_turns=1001),
    "max_turns is at most 1000",
)
row(
    "CancelTurn",
    "no turn id",
    lambda c: session_pb2.CancelTurnRequest(session_id=c.session_id),
    "1 to 128 characters",
)
row(
    "CancelTurn",
    "a long turn id",
    lambda c: session_pb2.CancelTurnRequest(session_id=c.session_id, turn_id=LONG),
    "1 to 128 characters",
)
