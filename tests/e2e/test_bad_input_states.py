"""Every call about a session, on a session in every state: the status, and what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from loadtest.simulation.loop import run
from statestore.records import Session
from tests.support.served_world import REQUESTS, served
from tests.support.situations import ABOUT, STATES, Case, called, check_usable
from tests.support.wire import Answer

OK = grpc.StatusCode.OK


@dataclass(frozen=True)
class Refusal:
    """A status, its reason, and words that its message or its hint must have."""

    code: grpc.StatusCode
    reason: str
    says: tuple[str, ...]

    def check(self, answer: Answer) -> None:
        assert (answer.code, answer.reason) == (self.code, self.reason), answer
        told = f"{answer.message} {answer.hint}"
        for words in self.says:
            assert words in told, (words, told)


REFUSALS = {
    "unknown": Refusal(
        grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", ("Check the id", "your tenant")
    ),
    "suspended": Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "SESSION_SUSPENDED", ("suspended", "ResumeSession")
    ),
    "closed": Refusal(grpc.StatusCode.FAILED_PRECONDITION, "SESSION_CLOSED", ("is closed",)),
    "busy": Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "TURN_IN_PROGRESS", ("is running", "Attach", "cancel")
    ),
    "nowhere": Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "MIGRATION_REFUSED", ("on no replica", "next turn")
    ),
    "occupied": Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "MIGRATION_REFUSED", ("runs here already",)
    ),
    "not owned": Refusal(grpc.StatusCode.ABORTED, "NOT_OWNER", ("owned", "Read the session")),
    "still owned": Refusal(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", ("goes on", "try again")),
}

TABLE = """
                idle unplaced  unknown malformed foreign suspended closed  purged  busy
GetSession      ok   ok        unknown unknown   unknown ok        ok      unknown ok
RunTurn         ok   ok        unknown unknown   unknown suspended closed  unknown busy
CancelTurn      ok   ok        unknown unknown   unknown ok        ok      unknown ok
ForkSession     ok   ok        unknown unknown   unknown ok        closed  unknown ok
SuspendSession  ok   ok        unknown unknown   unknown ok        closed  unknown busy
ResumeSession   ok   ok        unknown unknown   unknown ok        closed  unknown ok
CloseSession    ok   ok        unknown unknown   unknown ok        ok      unknown ok
GetTranscript   ok   ok        unknown unknown   unknown ok        ok      unknown ok
WatchSession    ok   ok        unknown unknown   unknown ok        ok      unknown ok
MigrateSession  ok   nowhere   unknown unknown   ok      suspended closed  unknown ok
DispatchTurn    ok   not-owned unknown unknown   unknown suspended closed  unknown busy
StopTurn        ok   ok        ok      ok        ok      ok        ok      ok      ok
HandOver        ok   ok        unknown unknown   ok      ok        ok      unknown ok
AbortHandOver   ok   ok        ok      ok        ok      ok        ok      ok      ok
ExportKv        ok   ok        ok      ok        ok      ok        ok      ok      ok
ImportSession   ok   ok        unknown unknown   unknown ok        closed  unknown occupied
ReleaseSession  ok   ok        ok      ok        ok      ok        ok      ok      still-owned
ReadTurns       ok   ok        unknown unknown   unknown ok        ok      unknown ok
"""
"""Operators are not confined to a tenant, nor are calls between gateways and replicas that name
none. What only stops, releases or exports is idempotent: there is nothing of a session that is not
there. ``busy``: another turn than the call's runs."""


def _read(table: str) -> Mapping[tuple[str, str], str]:
    head, *rows = table.strip().splitlines()
    states = head.split()
    found = {}
    for row in rows:
        method, *cells = row.split()
        assert len(cells) == len(states), method
        found.update({(method, s): c.replace("-", " ") for s, c in zip(states, cells, strict=True)})
    return found


CELLS = _read(TABLE)


def _names_a_session(request: Any) -> bool:
    """Itself, or in the request of somebody else that it passes on."""
    return any(
        field.name == "session_id"
        or (field.name in ("turn", "request") and _names_a_session(field.message_type))
        for field in request.fields
    )


def test_every_call_about_a_session_is_tried_in_every_state() -> None:
    """A new call, or a new state, needs its cells."""
    about = {name for name, kind in REQUESTS.items() if _names_a_session(kind.DESCRIPTOR)}
    assert about == set(ABOUT)
    assert set(CELLS) == {(method, state) for method in about for state in STATES}
    assert set(CELLS.values()) <= {"ok", *REFUSALS}


@pytest.mark.parametrize("method", ABOUT)
def test_a_call_on_a_session_in_each_state_is_served_or_refused_for_it(method: str) -> None:
    """A refused call changes nothing; afterwards the session takes turns."""

    async def test() -> None:
        async with served("a", "b") as gateway:
            gateway.serve_replica(gateway.world.replicas["a"])
            for state, arrange in STATES.items():
                case, answer = await called(method, arrange, gateway, f"{state} {method}")
                expected = CELLS[method, state]
                try:
                    await _check(case, answer, expected)
                    await check_usable(case)
                except AssertionError as error:
                    raise AssertionError(f"{method}, {state}: {error}") from error

    run(test)


async def _check(case: Case, answer: Answer, expected: str) -> None:
    answer.check()
    if expected == "ok":
        assert answer.code is OK, answer
        return
    REFUSALS[expected].check(answer)
    after = await case.served.session(case.session_id)
    assert _at_rest(after) == _at_rest(case.before)


def _at_rest(session: Session | None) -> object:
    """What a refused call must not have changed. A turn that runs goes on meanwhile."""
    if session is None or session.active_turn_id is None:
        return session
    return session.state, session.owner, session.turn_index, session.active_turn_id
