"""``sessile demo``: agents at work on a fleet of which parts are killed, drained and added.

Three replicas and two gateways as processes over a private store; eight agents through the public
client. Afterwards everything the agents received is compared with the ledgers, read raw from the
store. The exit code is 0 only if nothing was lost, repeated or left hanging, and if an idle session
moved with verified KV pages that its next turn found.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from redis import Redis
from rich.console import Console
from sessile import Sessile, SessileError

from gateway.cli.launch import Cluster, LaunchFailed
from gateway.cli.output import print_json
from loadtest.demo.agents import TENANT, Pace, make_agents, run_agent
from loadtest.demo.audit import audit
from loadtest.demo.board import Board
from loadtest.demo.director import Director
from loadtest.demo.report import Report, make_report
from loadtest.demo.tasks import MODULES
from loadtest.demo.view import View, summary

REPLICAS = 3
GATEWAYS = 2
VIEW_INTERVAL_S = 0.25
OPERATOR_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One engine's run, sized so that two cores do it in two minutes."""

    pace: Pace
    limit_s: float
    """The agents are given up after this."""
    engine_options: Mapping[str, str] = field(default_factory=dict)


PLANS = {
    # One thread prefills some 300 tokens/s, and decodes 12 tokens/s of one turn, 28 of four.
    "torch": Plan(
        Pace(
            agents=8, turns=6, max_turns=12, min_output_tokens=18, max_output_tokens=24,
            result_chars=850, gap_s=(0.5, 2.0), arrival_s=1.5,
        ),
        limit_s=480.0,
        # A short prefill step keeps the other turns' tokens flowing.
        engine_options={
            "threads": "1", "kv_memory_mb": "768", "max_prefill_tokens_per_step": "128",
        },
    ),
    # A byte is a token here.
    "sim": Plan(
        Pace(
            agents=8, turns=6, max_turns=24, min_output_tokens=40, max_output_tokens=56,
            result_chars=800, gap_s=(0.05, 0.3), arrival_s=0.1,
        ),
        limit_s=60.0,
        engine_options={"step_ms": "8", "capacity_pages": "16384"},
    ),
}  # fmt: skip


def run_demo(engine: str, out: Path, *, faults: bool = True, as_json: bool = False) -> int:
    """Runs it and writes the report to ``out``; the exit code. Blocks. With ``as_json`` the report
    is one line on standard output, and what happens is told by plain lines on standard error."""
    console = Console(stderr=True, force_terminal=False) if as_json else Console()
    logging.getLogger("sessile").setLevel(logging.ERROR)
    console.print(
        f"{PLANS[engine].pace.agents} agents, {REPLICAS} {engine} replicas, {GATEWAYS} gateways. "
        "The agent programs script their tool calls: the model is too small to call tools."
    )
    report: Report | None = None
    try:
        report = anyio.run(_run, engine, faults, console)
    except* LaunchFailed as group:
        for error in group.exceptions:
            console.print(f"the fleet did not start: {error}", style="bold red", markup=False)
    if report is None:
        return 2
    if as_json:
        print_json(report.to_json())
    console.print(summary(report))
    out.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    console.print(f"report: {out}")
    return 1 if report.problems else 0


async def _run(engine: str, with_faults: bool, console: Console) -> Report:
    plan, view = PLANS[engine], View(console)
    environment = {"OMP_NUM_THREADS": "1", "SESSILE_LOG_LEVEL": "WARNING"}
    async with Cluster(engine, plan.engine_options, environment=environment) as cluster:
        console.print(f"starting; logs: {cluster.log_directory}")
        await cluster.start(gateways=GATEWAYS, workers=REPLICAS)
        agents = make_agents(MODULES[: plan.pace.agents], GATEWAYS)
        board = view.board = Board(agents, view.show)
        targets = cluster.targets
        async with Sessile(targets, tenant=TENANT) as operator:
            director = Director(
                cluster,
                operator,
                board,
                total_turns=plan.pace.agents * plan.pace.turns,
                turn_tokens=plan.pace.min_output_tokens,
            )
            board.faults_done = not with_faults
            with view.live():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_watch, operator, view)
                    await _work(board, director, targets, plan, with_faults)
                    tasks.cancel_scope.cancel()
            seconds = board.elapsed_s
        with Redis.from_url(cluster.redis_url) as store:
            found = await anyio.to_thread.run_sync(audit, store, agents)
    return make_report(engine, agents, director.faults if with_faults else None, found, seconds)


async def _work(
    board: Board, director: Director, targets: list[str], plan: Plan, with_faults: bool
) -> None:
    """Agents and faults, until all are done or the time is up."""
    with anyio.move_on_after(plan.limit_s) as scope:
        async with anyio.create_task_group() as tasks:
            for number, agent in enumerate(board.agents):
                tasks.start_soon(run_agent, agent, number, targets, plan.pace, board)
            if with_faults:
                tasks.start_soon(director.run)
    if scope.cancelled_caught:
        director.faults.failures.append(f"not done after {plan.limit_s:g} s")
        for agent in board.agents:
            agent.error = agent.error or ("" if agent.phase.value == "done" else "not done")


async def _watch(operator: Sessile, view: View) -> None:
    """Keeps the picture's replicas up to date."""
    while True:
        try:
            with anyio.move_on_after(OPERATOR_TIMEOUT_S):
                view.replicas = await operator.fleet.replicas(include_down=True)
        except SessileError as error:
            logging.getLogger(__name__).debug("fleet not readable: %s", error)
        await anyio.sleep(VIEW_INTERVAL_S)
