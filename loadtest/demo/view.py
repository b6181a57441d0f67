"""How the demo shows itself: a live picture on a terminal, plain lines elsewhere, then tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sessile import Replica, ReplicaState

from loadtest.demo.board import AgentState, Board, Event, Phase
from loadtest.demo.report import Report, Spread

EVENTS_SHOWN = 12
REFRESH_PER_S = 8
STATE_STYLE = {
    ReplicaState.READY: "green",
    ReplicaState.DRAINING: "yellow",
    ReplicaState.SUSPECT: "yellow",
    ReplicaState.DOWN: "red",
}
PHASE_STYLE = {Phase.RUNNING: "bold", Phase.DONE: "green", Phase.FAILED: "bold red"}


class View:
    """Give it the board when there is one, and the replicas now and then."""

    def __init__(self, console: Console) -> None:
        self.replicas: Sequence[Replica] = ()
        self.board: Board | None = None
        self._console = console

    def show(self, event: Event) -> None:
        """An event, as a line of its own where there is no live picture."""
        if not self._console.is_terminal:
            self._console.print(_line(event), soft_wrap=True)

    def live(self) -> AbstractContextManager[object]:
        """The live picture, for as long as the context is open."""
        if not self._console.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=self._picture, console=self._console, refresh_per_second=REFRESH_PER_S
        )

    def _picture(self) -> RenderableType:
        if self.board is None:
            return Text("")
        # Each row is one line; two empty lines in between. What does not fit would be cut off.
        rows = len(self.replicas) + len(self.board.agents) + 2
        shown = min(EVENTS_SHOWN, max(self._console.height - rows - 2, 1))
        events = [_line(event) for event in self.board.events[-shown:]]
        for line in events:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(
            _replica_table(self.replicas), "", _session_table(self.board.agents), "", *events
        )


def _line(event: Event) -> Text:
    return Text(f"{event.at_s:7.2f}s  {event.text}", style="bold red" if event.fault else "")


def _replica_table(replicas: Sequence[Replica]) -> Table:
    table = Table(box=None, expand=True)
    for heading in ("replica", "state", "sessions", "running", "free pages", "prefill/s"):
        table.add_column(
            heading, no_wrap=True, justify="left" if heading in ("replica", "state") else "right"
        )
    for replica in replicas:
        load = replica.load
        table.add_row(
            str(replica.ref),
            Text(replica.state.value, style=STATE_STYLE.get(replica.state, "")),
            str(load.sessions),
            str(load.running_turns),
            f"{load.free_pages}/{replica.capacity_pages}",
            f"{load.prefill_tokens_per_s:.0f}",
        )
    return table


def _session_table(agents: Sequence[AgentState]) -> Table:
    table = Table(box=None, expand=True)
    for heading in ("agent", "replica", "turn", "tokens", "cached"):
        table.add_column(heading, no_wrap=True)
    # Alone in wrapping, and so the only one that gives way in a narrow window; its text does not.
    table.add_column("doing", ratio=1)
    for agent in agents:
        turn = agent.turns[-1] if agent.turns else None
        table.add_row(
            agent.name,
            agent.replica,
            str(len(agent.turns)),
            str(turn.tokens if turn else 0),
            str(turn.cached_tokens if turn else 0),
            Text(
                f"{agent.phase.value} {agent.activity}",
                style=PHASE_STYLE.get(agent.phase, "dim"),
                no_wrap=True,
                overflow="ellipsis",
            ),
        )
    return table


def summary(report: Report) -> RenderableType:
    """The tables at the end."""
    prefix = report.prefix
    facts = Table(title=f"{report.engine} engine, {report.seconds:.0f} s", show_header=False)
    for name, value in (
        ("agents, turns", f"{report.agents}, {report.turns}"),
        ("tokens in / cached / out",
         f"{prefix.input_tokens} / {prefix.cached_tokens} / {report.output_tokens}"),
        ("prefix reuse", f"{prefix.cached_tokens / max(prefix.input_tokens, 1):.1%} of input, "
                         f"{prefix.share_of_ideal:.1%} of the ideal"),
        ("handed over, not in the ratio", f"{prefix.left_out} turns"),
        ("output tokens checked", str(report.checked_tokens)),
        ("lost / repeated / altered",
         f"{report.lost_tokens} / {report.repeated_tokens} / {report.altered_tokens}"),
        ("turns left hanging", str(report.hanging_turns)),
        ("changes of replica", f"{report.moved_with_kv} with KV, "
                               f"{report.moved_by_recompute} by recompute"),
    ):  # fmt: skip
        facts.add_row(name, value)
    for move in report.moved_idle:
        facts.add_row(
            f"moved idle: {move.agent} {move.source} → {move.target}",
            f"{move.verified_tokens} tokens verified, {move.megabytes} MB, {move.duration_ms} ms; "
            f"next turn found {move.next_cached_tokens} cached",
        )
    if report.drain:
        facts.add_row(
            f"drained {report.drain['replica']}",
            f"{report.drain['moved_with_kv']} sessions with KV, "
            f"{report.drain['moved_without_kv']} by recompute, {report.drain['duration_ms']} ms",
        )
    times = Table(title="times in ms")
    for heading in ("", "count", "p50", "p95", "worst"):
        times.add_column(heading, justify="left" if not heading else "right")
    for kind, spread in report.ttft_ms.items():
        _add(times, f"time to first token, {kind} turns", spread)
    _add(times, f"pause when {report.killed_replica or 'a replica'} was killed",
         report.failover_gap_ms)  # fmt: skip
    _add(times, f"pause when {report.killed_gateway or 'a gateway'} was killed",
         report.gateway_gap_ms)  # fmt: skip
    _add(times, "pause when a running turn was handed over", report.hand_over_gap_ms)
    verdict = [Text(f"FAILED: {problem}", style="bold red") for problem in report.problems]
    return Group(facts, times, *(verdict or [Text("passed", style="bold green")]))


def _add(table: Table, name: str, spread: Spread) -> None:
    if spread.count:
        table.add_row(name, *map(str, (spread.count, spread.p50, spread.p95, spread.worst)))
