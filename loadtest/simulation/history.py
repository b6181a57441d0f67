"""One simulated history: agents work while things break, then everything is mended and checked.

Everything of it is drawn from its seed; a failure tells what it takes to run the same again.
"""

from __future__ import annotations

import random
import re
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace

from gateway.config import GatewayConfig, Tables
from loadtest.simulation.checkers.aftermath import check_losses
from loadtest.simulation.checkers.bounds import Bounds
from loadtest.simulation.checkers.forks import Forks
from loadtest.simulation.checkers.moves import MoveWatch
from loadtest.simulation.checkers.parking import Parking
from loadtest.simulation.checkers.pins import judged_pins
from loadtest.simulation.checkers.placements import judged_placements
from loadtest.simulation.checkers.progress import Progress
from loadtest.simulation.checkers.repeats import judged_repeats
from loadtest.simulation.checkers.streams import StreamWatch
from loadtest.simulation.checkers.verdicts import Verdicts
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.clients.agents import TENANTS, Agent
from loadtest.simulation.coverage import counted
from loadtest.simulation.faults import FAULTS, LOSSY, LOSSY_SHARE, Storm
from loadtest.simulation.loop import TraceHook, run, true_time
from loadtest.simulation.phases import live_and_judge
from loadtest.simulation.schedule import Fault, draw_kinds, draw_schedule, minimise
from loadtest.simulation.tally import Tally
from loadtest.simulation.world import ENGINE, START_US, World, world
from statestore.records import Turn, TurnStatus

TIGHT_SHARE = 0.25
"""Of the histories: small engines and small tables, so that their bounds are met."""
TIGHT_ENGINE = replace(ENGINE, max_running=2, max_queued=1)
TIGHT_TABLES = Tables(owners=2, salts=1, takeovers=1, relay_buffer_bytes=256)
TIGHT_RESIDENT = 2
TIGHT_WINDOW = 2
MIXED_SHARE = 0.2
"""Of the histories: one replica's KV, or its tokenizer, is another than the others'."""
BATCH_SHARE = 0.25
"""Of the agents: their turns are batch turns."""
MINIMISE_RUNS = 24
CRASHED = "failed unexpectedly:"
"""Says of a violation that it is no checker's, but a crash."""
CHECKER = re.compile(r"\b([IP]\d{1,2}):")
"""How a checker names itself in a violation."""
SESSION = re.compile(r"ses_[a-z2-7.]+")
MAX_TIMELINES = 2


@dataclass(frozen=True, slots=True)
class HistoryPlan:
    """How large a history is."""

    replicas: int = 3
    gateways: int = 2
    agents: int = 3
    turns: int = 4
    storm_s: float = 6.0
    kinds: tuple[str, ...] = ()
    """Kinds of faults; empty: drawn from the seed."""
    schedule: tuple[Fault, ...] | None = None
    """The faults themselves; None: drawn from the seed."""
    tight: bool | None = None
    """Small engines and tables; None: drawn from the seed."""
    capacity_pages: int = ENGINE.capacity_pages
    """Of each replica's KV."""
    mixed: str | None = None
    """What is another at the last replica: "weights", "tokens" or nothing (""); None: drawn."""


@dataclass(frozen=True, slots=True)
class HistoryReport:
    """What happened. ``violations`` must be empty."""

    seed: int
    violations: tuple[str, ...]
    log: tuple[str, ...]
    kinds: tuple[str, ...]
    turns: int
    committed: int
    failed: int
    moves: int
    losses: int
    """Times a client was told that the store lost what it knew."""
    forks: int
    suspensions: int
    closed: int
    """Sessions closed, ``purged`` among them."""
    purged: int
    virtual_s: float
    plan: HistoryPlan = field(default_factory=HistoryPlan)
    schedule: tuple[Fault, ...] = ()
    verified_pages: int = 0
    """Pages of KV that generations went on from, compared with their tokens."""
    coverage: Counter[str] = field(default_factory=Counter)
    timelines: tuple[str, ...] = ()
    """Of the sessions that the violations name."""

    @property
    def named(self) -> list[tuple[str, str]]:
        """(rule, violation) of everything a checker named; a crash is no checker's work."""
        found = ((CHECKER.search(v), v) for v in self.violations if CRASHED not in v)
        return [(match[1], violation) for match, violation in found if match]

    @property
    def checkers(self) -> frozenset[str]:
        """Names of the rules that were broken."""
        return frozenset(name for name, _ in self.named)

    def explain(self) -> str:
        """For a failing test: the faults that it takes, and what happened to the session."""
        least = minimised(self)
        lines = [f"seed {self.seed}: {len(self.violations)} violations", *self.violations]
        lines += [f"with {len(least.schedule)} of its {len(self.schedule)} faults:"]
        lines += [f"  {fault}" for fault in least.schedule]
        return "\n".join([*lines, *least.violations, *least.log, *least.timelines])


def simulate(
    seed: int, plan: HistoryPlan | None = None, trace: TraceHook | None = None
) -> HistoryReport:
    """Runs the history of a seed, in virtual time."""
    chosen = plan or HistoryPlan()
    return run(lambda: _history(seed, chosen), seed, trace)


def minimised(report: HistoryReport) -> HistoryReport:
    """The history with as few of its faults as are found to break one of the same rules."""
    best = report
    plan = replace(report.plan, kinds=report.kinds)

    def fails(schedule: object) -> bool:
        nonlocal best
        assert isinstance(schedule, list | tuple)
        tried = simulate(report.seed, replace(plan, schedule=tuple(schedule)))
        if tried.checkers & report.checkers:
            best = tried
            return True
        return False

    minimise(report.schedule, fails, MINIMISE_RUNS)
    return best


def kinds_of(seed: int) -> tuple[str, ...]:
    """Which faults a seed's history has."""
    draw = random.Random(f"{seed} kinds")
    lossy = draw.random() < LOSSY_SHARE
    kinds = draw_kinds(draw, sorted(set(FAULTS) - LOSSY))
    if lossy:
        # Losses that their owner can repair and losses that it cannot; nobody opens sessions then.
        kinds = (*sorted({*kinds, *LOSSY} - {"burst"}),)
    return kinds


async def _history(seed: int, plan: HistoryPlan) -> HistoryReport:
    kinds = plan.kinds or kinds_of(seed)
    schedule = plan.schedule
    if schedule is None:
        schedule = draw_schedule(random.Random(f"{seed} storm"), kinds, plan.storm_s)
    lossy = not LOSSY.isdisjoint(kinds)
    # An owner can repair only what it still has in memory.
    tight, mixed = plan.tight, plan.mixed
    if tight is None:
        tight = not lossy and random.Random(f"{seed} tight").random() < TIGHT_SHARE
    if mixed is None:
        draw = random.Random(f"{seed} mixed")
        mixed = draw.choice(("weights", "tokens")) if draw.random() < MIXED_SHARE else ""
    config = GatewayConfig(tables=TIGHT_TABLES) if tight else GatewayConfig()
    async with world(random.Random(f"{seed} world"), gateway_config=config) as built:
        if tight:
            built.engine, built.max_resident_sessions = TIGHT_ENGINE, TIGHT_RESIDENT
            built.network.window = TIGHT_WINDOW
        built.engine = replace(built.engine, capacity_pages=plan.capacity_pages)
        other = frozenset({f"r{plan.replicas}"})
        built.other_weights = other if mixed == "weights" else frozenset()
        built.other_tokens = other if mixed == "tokens" else frozenset()
        witness = built.server.watch = Witness(
            built.server.peek,
            built.timeline,
            true_time,
            START_US,
            Tally(built.coverage, built.has_died, built.whose, true_time),
            built.whose,
            built.lives,
        )
        StreamWatch(built, witness).attach()
        roomy = plan.capacity_pages >= ENGINE.capacity_pages
        MoveWatch(built, witness).attach("evict" not in kinds and roomy and not tight)
        forks = Forks(built)
        with (
            counted(built.coverage),
            judged_placements(built, witness),
            judged_pins(built.violations.append),
            judged_repeats(built),
            forks.watched(),
        ):
            for index in range(plan.replicas):
                await built.start_replica(f"r{index + 1}")
            for index in range(plan.gateways):
                built.start_gateway(f"g{index + 1}")
            agents = [
                Agent(
                    built,
                    f"a{index}",
                    random.Random(f"{seed} agent {index}"),
                    lossy=lossy,
                    tenant=TENANTS[index % len(TENANTS)],
                    batch=random.Random(f"{seed} batch {index}").random() < BATCH_SHARE,
                )
                for index in range(plan.agents)
            ]
            storm = Storm(built, agents, schedule)
            progress, verdicts = Progress(built, witness, agents), Verdicts(built, witness)
            # With few pages turns wait for each other's, and nobody can say for how long.
            samples = [progress.sample] if roomy else []
            parking = Parking(built)
            bounds = Bounds(built, [*samples, verdicts.sample, parking.sample])
            found: list[str] = []
            stored: list[Turn] = []
            try:
                stored = await live_and_judge(
                    seed,
                    plan.storm_s,
                    plan.turns,
                    built,
                    agents,
                    storm,
                    bounds,
                    witness,
                    forks,
                    found,
                )
            except Exception as error:  # noqa: BLE001 - told beside what was seen until then
                found.append(_crash("the history", error))
            found += [*witness.violations, *bounds.violations, *progress.violations]
            found += [*verdicts.violations, *parking.violations]
            found += [*forks.violations, *built.violations]
            found += check_losses(kinds, agents, witness.has_lost)
            for failure in built.failures:
                found.append(_crash("a process", failure))
            built.failures.clear()
        return _report(seed, plan, built, agents, storm, kinds, found, stored)


def _crash(what: str, error: BaseException) -> str:
    return f"{what} {CRASHED} {''.join(traceback.format_exception(error))}"


def _report(
    seed: int,
    plan: HistoryPlan,
    built: World,
    agents: list[Agent],
    storm: Storm,
    kinds: tuple[str, ...],
    found: list[str],
    stored: list[Turn],
) -> HistoryReport:
    named = dict.fromkeys(name for what in found for name in SESSION.findall(what))
    timelines = [
        line
        for name in [*named][:MAX_TIMELINES]
        for line in (f"timeline of {name}:", *built.timeline.of(name))
    ]
    seen, losses = built.coverage, sum(agent.losses for agent in agents)
    return HistoryReport(
        seed=seed,
        violations=tuple(found),
        log=tuple(storm.log),
        kinds=tuple(kinds),
        turns=len(stored),
        committed=sum(turn.status is TurnStatus.COMMITTED for turn in stored),
        failed=sum(turn.status is TurnStatus.FAILED for turn in stored),
        moves=sum(heard.moves for agent in agents for heard in agent.turns),
        losses=losses,
        forks=sum(agent.forks for agent in agents),
        suspensions=sum(agent.suspensions for agent in agents),
        closed=sum(agent.closed for agent in agents),
        purged=sum(agent.purged for agent in agents),
        virtual_s=true_time(),
        plan=plan,
        schedule=tuple(storm.schedule),
        verified_pages=sum(e.verified_pages for e in built.engines),
        coverage=Counter({name: count for name, count in sorted(seen.items()) if count}),
        timelines=tuple(timelines),
    )
