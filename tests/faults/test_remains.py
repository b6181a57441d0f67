"""What is left behind is seen without the fleet's own word."""

from __future__ import annotations

import dataclasses

import pytest

from tests.faults.engines import SIM
from tests.faults.fleet import fleet
from tests.faults.remains import of_session, what_is_left
from tests.faults.servers import SingleStore

CLOSED = {
    b"state": b"CLOSED",
    b"owner": b"",
    b"active": b"",
    b"mig": b"",
    b"length": b"3",
    b"t:t0:status": b"COMMITTED",
}


def test_nothing_is_said_of_a_closed_session() -> None:
    assert of_session(CLOSED, 12) == []


@pytest.mark.parametrize(
    ("changes", "ledger_bytes", "complaint"),
    [
        ({b"state": b"OPEN"}, 12, "it is OPEN"),
        ({b"owner": b"w1"}, 12, "it is closed and has owner b'w1'"),
        ({b"active": b"t0"}, 12, "it is closed and has active b't0'"),
        ({b"mig": b"m1"}, 12, "it is closed and has mig b'm1'"),
        ({b"t:t0:status": b"RUNNING"}, 12, "turn t0 is RUNNING"),
        ({}, 16, "its ledger has 16 bytes for 3 tokens"),
        ({}, 0, "its ledger has 0 bytes for 3 tokens"),
    ],
)
def test_what_a_closed_session_must_not_have_is_named(
    changes: dict[bytes, bytes], ledger_bytes: int, complaint: str
) -> None:
    assert of_session(CLOSED | changes, ledger_bytes) == [complaint]


@pytest.mark.anyio
@pytest.mark.parametrize(("lost_pages", "complaint"), [(0, ""), (60, "one waited for the other")])
async def test_pages_that_no_turn_can_use_are_noticed(lost_pages: int, complaint: str) -> None:
    """A worker that has fewer pages than it should, and says nothing of it."""
    pages = str(4096 - lost_pages)
    engine = dataclasses.replace(SIM, options=lambda d: SIM.options(d) | {"capacity_pages": pages})
    async with fleet(SingleStore(), engine=engine, workers=1, gateways=1, patient=True) as running:
        found = await what_is_left(running)
    assert len(found) == bool(complaint), found
    assert all(complaint in what for what in found), found
