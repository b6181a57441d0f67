"""The demo's audit finds what a faulty stream would show; a clean one passes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from loadtest.demo.audit import Audit, audit, common_prefix
from loadtest.demo.board import AgentState, Arrival, TurnLog

LEDGER = (7, 7, 7, 100, 101, 102, 103, 104)
OUTPUT_START = 3


@dataclass
class Store:
    """A session as the store holds it."""

    status: str = "COMMITTED"
    active: str = ""
    ledger: tuple[int, ...] = LEDGER
    fields: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.fields = {
            "active": self.active,
            "t:turn:status": self.status,
            "t:turn:start_len": str(OUTPUT_START),
            "t:turn:end_len": str(len(LEDGER)),
        }

    def get(self, name: str, /) -> bytes:
        assert name == "sessile:{fam}:l:ses_fam"
        return struct.pack(f"<{len(self.ledger)}I", *self.ledger)

    def hget(self, name: str, key: str, /) -> bytes | None:
        assert name == "sessile:{fam}:s:ses_fam"
        value = self.fields.get(key)
        return None if value is None else value.encode()


def received(*arrivals: tuple[int, tuple[int, ...]]) -> AgentState:
    agent = AgentState("agent-1", "csv.py", 0, session_id="ses_fam")
    log = TurnLog("turn", 0.0)
    log.arrivals = [Arrival(0.0, position, tokens) for position, tokens in arrivals]
    agent.turns.append(log)
    return agent


def outcome(found: Audit) -> tuple[int, int, int, int]:
    return found.lost, found.repeated, found.altered, found.hanging


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ([(3, (100, 101, 102)), (6, (103, 104))], (0, 0, 0, 0)),
        ([(3, (100, 101)), (6, (103, 104))], (1, 0, 0, 0)),
        ([(3, (100, 101, 102)), (6, (103,))], (1, 0, 0, 0)),
        ([(3, (100, 101, 102)), (5, (102, 103, 104))], (0, 1, 0, 0)),
        ([(3, (100, 999, 102, 103, 104))], (0, 0, 1, 0)),
        ([(3, (100, 101, 102, 103, 104, 105))], (0, 0, 1, 0)),
    ],
    ids=["clean", "gap", "short", "repeat", "other-token", "beyond-the-ledger"],
)
def test_a_stream_is_held_against_the_raw_ledger(
    arrivals: list[tuple[int, tuple[int, ...]]], expected: tuple[int, int, int, int]
) -> None:
    found = audit(Store(), [received(*arrivals)])
    assert outcome(found) == expected
    assert found.checked == 5
    assert found.clean == (expected == (0, 0, 0, 0))


@pytest.mark.parametrize(
    "store",
    [
        Store(status="RUNNING"),
        Store(status=""),
        Store(active="turn"),
        Store(ledger=(*LEDGER, 1)),
        Store(ledger=LEDGER[:-1]),
    ],
    ids=["running", "unknown", "active", "tail", "cut"],
)
def test_what_the_store_did_not_finish_is_a_problem(store: Store) -> None:
    found = audit(store, [received((3, (100, 101, 102, 103, 104)))])
    assert not found.clean
    assert found.problems


def test_the_shared_prefix_ends_where_ledgers_differ() -> None:
    assert common_prefix([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3)]) == 3
    assert common_prefix([]) == 0
