"""The demo's verdict: what it takes for a run to fail, and what counts as a move with its KV."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sessile import (
    Finished,
    FinishReason,
    Migration,
    Moved,
    MoveReason,
    Position,
    ReplicaRef,
    TurnStatus,
    Usage,
)

from loadtest.demo.audit import Audit
from loadtest.demo.board import AgentState, Arrival, TurnLog
from loadtest.demo.director import Faults, IdleMove, Kill
from loadtest.demo.report import Report, make_report

R1, R2, R3 = (ReplicaRef(f"r{n}", 1) for n in (1, 2, 3))
FIRST_END, SECOND_END = 520, 1020
MOVE = Migration("ses_fam", R1, R2, True, 512, 4096, 10.0, 1, False, "")


def turn(name: str, replica: ReplicaRef, start: int, end: int, cached: int) -> TurnLog:
    """A turn without a fault: ``start`` tokens of context, of which ``cached`` were found."""
    log = TurnLog(name, 0.0, replica.replica_id, start)
    log.arrivals = [Arrival(1.0, start, (1,)), Arrival(2.0, start + 1, (1,))]
    log.finished = Finished(
        TurnStatus.COMMITTED,
        FinishReason.STOP,
        Usage(start, cached, end - start),
        Position(end, b""),
        text="",
        text_offset=0,
        tool_calls=(),
        error="",
    )
    return log


def moved(log: TurnLog, source: ReplicaRef, target: ReplicaRef, reason: MoveReason) -> TurnLog:
    """The same turn, moved after its first token."""
    log.moved.append((1.5, Moved(source, target, reason, 2)))
    return log


def report(*turns: TurnLog, faults: Faults | None = None, audit: Audit | None = None) -> Report:
    agent = AgentState("agent-1", "csv.py", 0, "ses_fam", turns=list(turns))
    if faults is not None:
        faults.idle_moves = [replace(move, agent=agent) for move in faults.idle_moves]
    return make_report("sim", [agent], faults, audit or Audit(), 1.0)


def first(replica: ReplicaRef = R1) -> TurnLog:
    return turn("t0", replica, 500, FIRST_END, 0)


def second(replica: ReplicaRef, cached: int) -> TurnLog:
    return turn("t1", replica, 1000, SECOND_END, cached)


def move() -> IdleMove:
    return IdleMove(AgentState("", "", 0), MOVE, 1)


def test_a_next_turn_at_the_target_that_finds_every_verified_page_proves_a_move() -> None:
    result = report(first(), second(R2, 512), faults=Faults(idle_moves=[move()]))
    assert result.moved_idle[0].covered
    assert result.problems == []


@pytest.mark.parametrize(
    "next_turn",
    [
        second(R2, 511),
        second(R3, 512),
        moved(second(R2, 512), R2, R1, MoveReason.FAILOVER),
    ],
    ids=["too few", "elsewhere", "moved on"],
)
def test_pages_that_another_replica_or_nobody_served_prove_nothing(next_turn: TurnLog) -> None:
    result = report(first(), next_turn, faults=Faults(idle_moves=[move()]))
    assert not result.moved_idle[0].covered
    assert len(result.problems) == 1


def test_a_run_with_faults_and_no_proven_move_has_failed() -> None:
    assert report(first(), faults=Faults()).problems


@pytest.mark.parametrize(
    "audit",
    [Audit(lost=1), Audit(repeated=1), Audit(altered=1), Audit(hanging=1, problems=["hangs"])],
    ids=["lost", "repeated", "altered", "hanging"],
)
def test_a_token_or_a_turn_gone_wrong_fails_the_run(audit: Audit) -> None:
    assert report(first(), second(R1, 512), audit=audit).problems


def test_a_killed_turn_has_to_be_failed_over() -> None:
    kill = Kill("r2", 1.4, "t1", 12)

    def problems(killed: TurnLog) -> list[str]:
        faults = Faults(idle_moves=[move()], replica_kill=kill)
        proven = report(first(), second(R2, 512), killed, faults=faults)
        return proven.problems

    last = turn("t1", R2, 1500, 1520, 1008)
    assert problems(replace(last, moved=[]))
    assert problems(moved(replace(last, moved=[]), R2, R3, MoveReason.MIGRATION))
    assert not problems(moved(replace(last, moved=[]), R2, R3, MoveReason.FAILOVER))


@pytest.mark.parametrize(
    ("next_turn", "counts"),
    [
        (second(R1, 0), (0, 0)),
        (second(R2, 512), (1, 0)),
        (second(R2, 64), (0, 1)),
        (moved(second(R1, 512), R1, R2, MoveReason.FAILOVER), (1, 0)),
        (moved(second(R1, 0), R1, R2, MoveReason.FAILOVER), (0, 1)),
        (moved(second(R2, 0), R2, R3, MoveReason.MIGRATION), (0, 2)),
    ],
    ids=["stayed", "with KV", "without", "pulled in mid-turn", "recomputed in mid-turn", "twice"],
)
def test_a_move_counts_by_what_was_found_after_it(
    next_turn: TurnLog, counts: tuple[int, int]
) -> None:
    result = report(first(), next_turn)
    assert (result.moved_with_kv, result.moved_by_recompute) == counts


def test_reuse_counts_fail_overs_and_leaves_hand_overs_out() -> None:
    failed_over = report(first(), moved(second(R1, 260), R1, R2, MoveReason.FAILOVER)).prefix
    assert (failed_over.reused_tokens, failed_over.ideal_tokens) == (260, FIRST_END)
    handed_over = report(first(), moved(second(R1, 1000), R1, R2, MoveReason.MIGRATION)).prefix
    assert (handed_over.reused_tokens, handed_over.ideal_tokens) == (0, 0)
    assert handed_over.left_out == 1


def test_little_reuse_fails_a_run_without_faults() -> None:
    assert report(first(), second(R1, 512)).problems == []
    assert report(first(), second(R1, 500)).problems
