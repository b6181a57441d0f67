"""What counts as a row of the failure table: that it happened, not that something like it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import anyio
import pytest

from gateway.core.machines import TurnEvent, TurnPhase
from loadtest.simulation.checkers.stored import Ref, Seen, SeenTurn
from loadtest.simulation.coverage import Row, transition
from loadtest.simulation.loop import Process, run, true_time
from loadtest.simulation.tally import Tally
from statestore.script_runner import script_call

ONE, TWO = (b"r1", b"7"), (b"r2", b"8")
TURN = b"t1"


def session(owner: Ref, epoch: int, status: bytes, attempt: bytes = b"1", size: int = 4) -> Seen:
    return Seen(
        state=b"OPEN",
        ledger=b"0123456789"[:size],
        head=(b"%d" % size, b""),
        epoch=(epoch, b"nonce"),
        owner=owner,
        turns={TURN: SeenTurn(status, b"", attempt, 1_000)},
    )


class Store:
    """Drives a tally. ``dead`` are replicas that have died, ``processes`` those that write."""

    def __init__(self) -> None:
        self.dead: set[Ref] = set()
        self.processes: dict[Process, Ref] = {}
        self.seen: Counter[str] = Counter()
        self.tally = Tally(self.seen, self.dead.__contains__, self.processes.get, true_time)

    def did(
        self, script: str, outcome: bytes, before: Seen, now: Seen, writer: Process | None = None
    ) -> Seen:
        call = script_call(script, ["s"], [])
        self.tally.count("s", before, now, call, outcome, writer, leaving=False)
        return now

    def takes_over(self, *, dies: bool) -> Seen:
        """From ONE to TWO, in mid-turn."""
        if dies:
            self.dead.add(ONE)
        before = session(ONE, 1, b"RUNNING")
        return self.did("take", b"written", before, session(TWO, 2, b"INTERRUPTED"))


async def _continued(dies: bool, ends: bytes) -> int:
    store = Store()
    taken = store.takes_over(dies=dies)
    if ends:
        store.did("cancel", b"ended", taken, session(TWO, 2, ends))
    resumed = store.did("resume", b"resumed", taken, session(TWO, 2, b"RUNNING", b"2"))
    assert not store.seen[Row.REPLICA_DIES]
    store.did("append", b"appended", resumed, session(TWO, 2, b"RUNNING", b"2", 6))
    store.did("append", b"appended", resumed, session(TWO, 2, b"RUNNING", b"2", 8))
    return store.seen[Row.REPLICA_DIES]


@pytest.mark.parametrize(
    ("dies", "ends", "counts"), [(True, b"", 1), (False, b"", 0), (True, b"CANCELLED", 0)]
)
def test_a_turn_counts_as_continued_if_its_replica_died_and_another_adds_to_it(
    dies: bool, ends: bytes, counts: int
) -> None:
    assert run(lambda: _continued(dies, ends)) == counts


async def _late_writes(stopped: bool, taken_while_stopped: bool, others: bool) -> int:
    store, writer = Store(), Process("r1")
    store.processes[writer] = TWO if others else ONE
    if stopped:
        writer.stop()
    await anyio.sleep(1.0)
    if not taken_while_stopped:
        writer.resume()
        await anyio.sleep(1.0)
    taken = store.takes_over(dies=False)
    await anyio.sleep(1.0)
    if writer.stopped:
        writer.resume()
    store.did("append", b"fenced", taken, taken, writer)
    store.did("append", b"fenced", taken, taken)
    return store.seen[Row.REPLICA_HANGS]


@pytest.mark.parametrize(
    ("stopped", "while_stopped", "others", "counts"),
    [
        (True, True, False, 1),
        (False, True, False, 0),
        (True, False, False, 0),
        (True, True, True, 0),
    ],
)
def test_a_refused_write_counts_if_its_process_was_replaced_while_it_stood_still(
    stopped: bool, while_stopped: bool, others: bool, counts: int
) -> None:
    assert run(lambda: _late_writes(stopped, while_stopped, others)) == counts


async def _repairs(lost: bool, by: Ref, again: bytes) -> int:
    store = Store()
    whole = session(ONE, 1, b"RUNNING", size=8)
    short = session(ONE, 1, b"RUNNING", size=4)
    if lost:
        store.tally.lost({"s": whole})
    store.did("repair", b"appended", short, replace(whole, owner=by, ledger=again))
    store.did("repair", b"appended", short, replace(whole, owner=by, ledger=again))
    return store.seen[Row.STORE_FAILS_OVER]


@pytest.mark.parametrize(
    ("lost", "by", "again", "counts"),
    [
        (True, ONE, b"01234567", 1),
        (True, ONE, b"0123456789", 1),
        (False, ONE, b"01234567", 0),
        (True, TWO, b"01234567", 0),
        (True, ONE, b"0123abcd", 0),
        (True, ONE, b"012345", 0),
    ],
)
def test_a_repair_counts_if_the_owner_puts_back_what_the_store_had_lost(
    lost: bool, by: Ref, again: bytes, counts: int
) -> None:
    assert run(lambda: _repairs(lost, by, again)) == counts


async def _after_a_restart(turn_runs: bool, script: str) -> int:
    store = Store()
    before = session(ONE, 1, b"RUNNING")
    store.tally.restarted({"s": before if turn_runs else session(ONE, 1, b"COMMITTED")})
    assert not store.seen[Row.STORE_RESTARTS]
    for size in (6, 8):
        now = session(ONE, 1, b"RUNNING", size=size)
        before = store.did(script, b"appended", before, now)
    return store.seen[Row.STORE_RESTARTS]


@pytest.mark.parametrize(
    ("turn_runs", "script", "counts"),
    [(True, "append", 1), (False, "append", 0), (True, "repair", 0)],
)
def test_a_restart_of_the_store_counts_if_a_turn_of_before_goes_on(
    turn_runs: bool, script: str, counts: int
) -> None:
    assert run(lambda: _after_a_restart(turn_runs, script)) == counts


@pytest.mark.parametrize("script", ["resume", "repair"])
def test_only_a_resume_resumes_a_turn(script: str) -> None:
    async def steps() -> Counter[str]:
        store = Store()
        before = session(ONE, 1, b"INTERRUPTED")
        store.did(script, b"resumed", before, session(ONE, 1, b"RUNNING", b"2"))
        return store.seen

    resumed = transition("turn", TurnPhase.INTERRUPTED, TurnEvent.RESUME)
    assert run(steps)[resumed] == (script == "resume")
