"""The figures of a run, from what the agents saw and what the audit found in the store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sessile import MoveReason

from loadtest.demo.audit import Audit, common_prefix
from loadtest.demo.board import AgentState, TurnLog
from loadtest.demo.director import Faults, IdleMove

PAGE_TOKENS = 16
"""Of both embedded engines: KV is cached in whole pages."""
NO_FAULTS_SHARE = 0.98
"""Share of the ideal prefix reuse below which a run without faults has failed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in ms; the percentiles are the nearest ranks."""

    count: int
    p50: float | None
    p95: float | None
    worst: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if not seconds:
            return cls(0, None, None, None)
        ordered = sorted(seconds)

        def rank(share: float) -> float:
            return round(ordered[math.ceil(share * len(ordered)) - 1] * 1000, 1)

        return cls(len(ordered), rank(0.5), rank(0.95), rank(1.0))


@dataclass(frozen=True, slots=True)
class Prefix:
    """How much of every prompt came from a KV cache. Ideal: everything that had been computed for
    the same session before, and the shared system prompt but for the very first session.

    A turn reports what its last attempt found. After a fail-over that counts, with what had to be
    computed again. After a hand-over it says nothing of the attempt that began the turn, so that
    those turns are left out of the comparison."""

    input_tokens: int
    cached_tokens: int
    reused_tokens: int
    """Of ``ideal_tokens``; no turn counts beyond its ideal."""
    ideal_tokens: int
    left_out: int
    """Turns that were handed over."""

    @property
    def share_of_ideal(self) -> float:
        return self.reused_tokens / self.ideal_tokens if self.ideal_tokens else 1.0


@dataclass(frozen=True, slots=True)
class MovedIdle:
    """An idle session that was moved, and what its next turn found."""

    agent: str
    source: str
    target: str
    verified_tokens: int
    megabytes: float
    duration_ms: float
    next_cached_tokens: int | None
    """None: no turn followed."""
    next_ttft_ms: float | None
    covered: bool
    """The next turn ran at the target and found everything that was verified."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is printed and written to the JSON file."""

    engine: str
    with_faults: bool
    agents: int
    seconds: float
    turns: int
    output_tokens: int
    prefix: Prefix
    checked_tokens: int
    lost_tokens: int
    repeated_tokens: int
    altered_tokens: int
    hanging_turns: int
    ttft_ms: dict[str, Spread]
    """By how the turn began: first, pinned, moved (its KV was there), recomputed."""
    failover_gap_ms: Spread
    """Pauses of streams whose replica was killed in mid-turn."""
    hand_over_gap_ms: Spread
    """Pauses of streams whose turn was handed over in a planned move."""
    gateway_gap_ms: Spread
    """Longest pause of each stream that had to connect again."""
    moved_with_kv: int
    """Changes of replica, in mid-turn or between turns and for whatever reason, after which the
    session's earlier context was found in the KV cache."""
    moved_by_recompute: int
    """The other ones."""
    moved_idle: list[MovedIdle]
    drain: dict[str, Any]
    killed_replica: str
    killed_gateway: str
    joined_replica: str
    problems: list[str]
    """Empty: the run passed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived ones."""
        values = dataclasses.asdict(self)
        values["prefix"]["share_of_ideal"] = round(self.prefix.share_of_ideal, 4)
        values["passed"] = not self.problems
        return values


def make_report(
    engine: str,
    agents: Sequence[AgentState],
    faults: Faults | None,
    audit: Audit,
    seconds: float,
) -> Report:
    """``faults`` is None for a run without."""
    prefix = _prefix(agents, common_prefix(audit.ledgers))
    moves = [(move.event.reason, move.gap_s) for turn in _turns(agents) for move in turn.moves()]
    changes = list(_changes(agents))
    done = faults or Faults()
    moved_idle = [_moved_idle(move) for move in done.idle_moves]
    drained = done.drained
    return Report(
        engine=engine,
        with_faults=faults is not None,
        agents=len(agents),
        seconds=round(seconds, 1),
        turns=sum(turn.finished is not None for turn in _turns(agents)),
        output_tokens=sum(turn.tokens for turn in _turns(agents)),
        prefix=prefix,
        checked_tokens=audit.checked,
        lost_tokens=audit.lost,
        repeated_tokens=audit.repeated,
        altered_tokens=audit.altered,
        hanging_turns=audit.hanging,
        ttft_ms=_ttft(agents),
        failover_gap_ms=_gaps(moves, MoveReason.FAILOVER),
        hand_over_gap_ms=_gaps(moves, MoveReason.MIGRATION),
        gateway_gap_ms=Spread.of(list(_gateway_gaps(agents, done))),
        moved_with_kv=sum(changes),
        moved_by_recompute=len(changes) - sum(changes),
        moved_idle=moved_idle,
        drain={}
        if drained is None
        else {
            "replica": drained.replica,
            "moved_with_kv": drained.progress.moved_with_kv,
            "moved_without_kv": drained.progress.moved_without_kv,
            "failed": drained.progress.failed,
            "duration_ms": round(drained.duration_s * 1000, 1),
        },
        killed_replica=done.replica_kill.victim if done.replica_kill else "",
        killed_gateway=done.gateway_kill.victim if done.gateway_kill else "",
        joined_replica=done.joined,
        problems=[
            *audit.problems,
            *(f"{agent.name}: {agent.error}" for agent in agents if agent.error),
            *_integrity_problems(audit),
            *(_fault_problems(agents, faults, moved_idle) if faults else _reuse_problems(prefix)),
        ],
    )


def _turns(agents: Sequence[AgentState]) -> Iterator[TurnLog]:
    for agent in agents:
        yield from agent.turns


def _finished_with_previous(
    agents: Sequence[AgentState],
) -> Iterator[tuple[TurnLog, TurnLog | None]]:
    """Every finished turn with the one before it in its session."""
    for agent in agents:
        previous: TurnLog | None = None
        for turn in agent.turns:
            if turn.finished is not None:
                yield turn, previous
            previous = turn


def _prefix(agents: Sequence[AgentState], shared: int) -> Prefix:
    given = cached = reused = ideal = left_out = 0
    computed_before = 0  # of the system prompt: nothing for the very first session
    for turn, previous in _finished_with_previous(agents):
        assert turn.finished is not None
        usage = turn.finished.usage
        if previous is not None and previous.finished is not None:
            reusable = previous.finished.end.length
        else:
            reusable, computed_before = computed_before, shared
        given += usage.input_tokens
        cached += usage.cached_tokens
        if any(event.reason is MoveReason.MIGRATION for _, event in turn.moved):
            left_out += 1
        else:
            reused += min(usage.cached_tokens, reusable)
            ideal += reusable
    return Prefix(given, cached, reused, ideal, left_out)


def _found_kv(turn: TurnLog, previous: TurnLog | None) -> bool:
    """The turn's last attempt found what the session's earlier turns (for a first turn: what an
    earlier attempt) had computed."""
    if turn.finished is None:
        return False
    computed = turn.output_start
    if previous is not None and previous.finished is not None:
        computed = previous.finished.end.length
    # The last token has no KV yet, and a page counts only when it is full.
    return turn.finished.usage.cached_tokens >= computed - 2 * PAGE_TOKENS


def _changes(agents: Sequence[AgentState]) -> Iterator[bool]:
    """Every change of replica that an agent saw: whether the KV was there. A turn that moved in its
    middle too is judged by its last attempt, the only one that it reports on."""
    for turn, previous in _finished_with_previous(agents):
        between = previous is not None and turn.replica != previous.last_replica
        for _ in range(between + len(turn.moved)):
            yield _found_kv(turn, previous)


def _kind(turn: TurnLog, previous: TurnLog | None) -> str:
    """How a turn began."""
    if not (turn.moved and turn.arrivals and turn.moved[0][0] < turn.arrivals[0].at_s):
        if previous is None or previous.finished is None:
            return "first"
        if turn.replica == previous.last_replica:
            return "pinned"
    return "moved" if _found_kv(turn, previous) else "recomputed"


def _ttft(agents: Sequence[AgentState]) -> dict[str, Spread]:
    times: dict[str, list[float]] = {"first": [], "pinned": [], "moved": [], "recomputed": []}
    for turn, previous in _finished_with_previous(agents):
        if turn.ttft_s is not None:
            times[_kind(turn, previous)].append(turn.ttft_s)
    return {kind: Spread.of(seconds) for kind, seconds in times.items()}


def _gaps(moves: Sequence[tuple[MoveReason, float | None]], reason: MoveReason) -> Spread:
    return Spread.of([gap_s for why, gap_s in moves if why is reason and gap_s is not None])


def _gateway_gaps(agents: Sequence[AgentState], faults: Faults) -> Iterator[float]:
    if faults.gateway_kill is None:
        return
    for turn in _turns(agents):
        if turn.result is not None and turn.result.reconnects:
            gap_s = turn.longest_gap_after(faults.gateway_kill.at_s)
            if gap_s is not None:
                yield gap_s


def _moved_idle(move: IdleMove) -> MovedIdle:
    turns, migration = move.agent.turns, move.migration
    turn = turns[move.next_turn] if move.next_turn < len(turns) else None
    cached = turn.finished.usage.cached_tokens if turn and turn.finished else None
    ttft_s = turn.ttft_s if turn else None
    return MovedIdle(
        agent=move.agent.name,
        source=migration.source.replica_id,
        target=migration.target.replica_id,
        verified_tokens=migration.verified_tokens,
        megabytes=round(migration.bytes_copied / 1e6, 2),
        duration_ms=round(migration.duration_ms, 1),
        next_cached_tokens=cached,
        next_ttft_ms=None if ttft_s is None else round(ttft_s * 1000, 1),
        covered=(
            migration.moved
            and migration.verified_tokens > 0
            # A turn that moved on again was served by somebody else's pages.
            and turn is not None
            and turn.replica == migration.target.replica_id
            and not turn.moved
            and cached is not None
            and cached >= migration.verified_tokens
        ),
    )


def _integrity_problems(audit: Audit) -> Iterator[str]:
    for count, what in (
        (audit.lost, "tokens of the ledger never reached their agent"),
        (audit.repeated, "tokens were delivered more than once"),
        (audit.altered, "delivered tokens are not what the ledger holds"),
    ):
        if count:
            yield f"{count} {what}"


def _fault_problems(
    agents: Sequence[AgentState], faults: Faults, moved_idle: Sequence[MovedIdle]
) -> Iterator[str]:
    """What a run with faults has to show beyond integrity."""
    yield from faults.failures
    if not any(move.covered for move in moved_idle):
        yield "no idle session moved with verified pages that its next turn found cached"
    turns = {turn.turn_id: turn for turn in _turns(agents)}
    if (kill := faults.replica_kill) and not any(
        event.reason is MoveReason.FAILOVER for _, event in turns[kill.turn_id].moved
    ):
        yield f"the turn that ran on {kill.victim} when it was killed did not move"
    if kill := faults.gateway_kill:
        result = turns[kill.turn_id].result
        if result is None or not result.reconnects:
            yield f"the turn that streamed through {kill.victim} did not have to connect again"


def _reuse_problems(prefix: Prefix) -> Iterator[str]:
    if prefix.share_of_ideal < NO_FAULTS_SHARE:
        yield (
            f"only {prefix.share_of_ideal:.1%} of the ideal prefix reuse was reached, "
            f"{NO_FAULTS_SHARE:.0%} is expected without faults"
        )
