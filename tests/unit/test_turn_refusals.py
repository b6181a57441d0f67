"""What a store's refusal of a turn is called towards whoever asked for it."""

from __future__ import annotations

import pytest

from gateway.core import errors
from statestore.ports import Fenced, LimitReached, Missing, Refused
from statestore.records import NO_EPOCH, SessionState
from workers.turn.ports import refusal


@pytest.mark.parametrize(
    ("outcome", "error", "says"),
    [
        (Fenced(NO_EPOCH, None), errors.NotOwner, "another epoch"),
        (Fenced(NO_EPOCH, None, data_loss=True), errors.DataLoss, "cannot be joined"),
        (Missing(), errors.NotFound, "does not exist"),
        (LimitReached("turns of the session"), errors.InvalidRequest, "turns of the session"),
        (Refused(SessionState.CLOSED), errors.SessionClosed, "closed"),
        (Refused(SessionState.SUSPENDED), errors.SessionSuspended, "suspended"),
        (Refused(SessionState.OPEN, "t1"), errors.TurnInProgress, "t1"),
        (Refused(SessionState.OPEN), errors.NotOwner, "not one for this replica"),
    ],
)
def test_a_refusal_says_what_it_is(
    outcome: Fenced | Missing | LimitReached | Refused,
    error: type[errors.SessileError],
    says: str,
) -> None:
    found = refusal("ses_f", outcome)
    assert type(found) is error
    assert says in found.message
