"""One simulated history: agents work while things break, then everything is mended and checked.

A safety phase is followed by a liveness phase: once nothing is broken any more, every accepted turn
must have ended, and every session must be able to run another turn (I6, I7).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import anyio

from gateway.config import GatewayConfig
from loadtest.simulation.agents import PATIENCE_S, TURN_S, Agent
from loadtest.simulation.checks import check_agent, check_closed, check_replicas
from loadtest.simulation.faults import LOSSY, Storm
from loadtest.simulation.lifecycle import close, live
from loadtest.simulation.loop import TraceHook, run, true_time
from loadtest.simulation.witness import Witness
from loadtest.simulation.world import START_US, World, world
from statestore.records import TurnStatus

SETTLE_S = 4.0
"""Longer than a lease and an amnesty: afterwards everybody knows who lives."""
LIVENESS_S = 10.0
EXPORT_LEASE_S = 35.0
"""Longer than pages are held for a peer that does not come for them."""


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

    def explain(self) -> str:
        """For a failing test: everything needed to run the same history again."""
        lines = [f"seed {self.seed}, faults {', '.join(self.kinds)}:"]
        return "\n".join([*lines, *self.violations, "what happened:", *self.log])


def simulate(
    seed: int, plan: HistoryPlan | None = None, trace: TraceHook | None = None
) -> HistoryReport:
    """Runs the history of a seed, in virtual time."""
    chosen = plan or HistoryPlan()
    return run(lambda: _history(seed, chosen), seed, trace)


async def _history(seed: int, plan: HistoryPlan) -> HistoryReport:
    async with world(random.Random(f"{seed} world"), gateway_config=GatewayConfig()) as built:
        witness = built.server.watch = Witness(
            built.server.peek, built.timeline, true_time, START_US
        )
        for index in range(plan.replicas):
            await built.start_replica(f"r{index + 1}")
        for index in range(plan.gateways):
            built.start_gateway(f"g{index + 1}")
        lossy = not LOSSY.isdisjoint(plan.kinds)
        agents = [
            Agent(built, f"a{index}", random.Random(f"{seed} agent {index}"), lossy=lossy)
            for index in range(plan.agents)
        ]
        storm = Storm(
            built, agents, random.Random(f"{seed} storm"), kinds=sorted(plan.kinds) or None
        )
        found = await _work_in_a_storm(plan, agents, storm)
        found += await _liveness(agents)
        if check_replicas(built):
            await anyio.sleep(EXPORT_LEASE_S)  # a puller was killed: what it was to have is held
        found += [*witness.violations, *built.violations, *check_replicas(built)]
        found += await _close_some(built, agents, random.Random(f"{seed} close"))
        for agent in agents:
            found += await check_agent(built, agent)
        return await _report(seed, built, agents, storm, found)


async def _work_in_a_storm(plan: HistoryPlan, agents: list[Agent], storm: Storm) -> list[str]:
    limit_s = plan.storm_s + plan.turns * (TURN_S + PATIENCE_S)
    with anyio.move_on_after(limit_s) as scope:
        async with anyio.create_task_group() as tasks:
            for agent in tuple(agents):
                tasks.start_soon(live, agent, agents, plan.turns, name=agent.name)
            async with anyio.create_task_group() as faults:
                await storm.blow(faults, plan.storm_s)
            await storm.mend()
    await anyio.sleep(SETTLE_S)
    return ["I7: the agents did not come to an end"] if scope.cancelled_caught else []


async def _liveness(agents: list[Agent]) -> list[str]:
    """Every session that is open runs one more turn, and it succeeds."""
    started = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for agent in agents:
            if not agent.closed:
                tasks.start_soon(agent.turn, name=f"{agent.name} again")
    found = []
    if anyio.current_time() - started > LIVENESS_S:
        found.append(f"I7: healthy turns took {anyio.current_time() - started:.1f} s")
    await anyio.sleep(SETTLE_S)
    return found


async def _close_some(built: World, agents: list[Agent], draw: random.Random) -> list[str]:
    """A session that is closed while nothing is broken leaves no KV with its owner (I9)."""
    found: list[str] = []
    for agent in agents:
        if not agent.closed and draw.random() < 0.5:
            before = await built.store.get_session(agent.session_id)
            await close(agent, purge=False)
            if before is not None and before.owner is not None:
                found += await check_closed(built, agents, agent, before.owner.replica)
    return found


async def _report(
    seed: int, built: World, agents: list[Agent], storm: Storm, found: list[str]
) -> HistoryReport:
    sessions = [await built.store.get_session(agent.session_id) for agent in agents]
    stored = [
        turn
        for session in sessions
        if session is not None
        for turn in await built.store.get_turns(session, 0, 1000)
    ]
    return HistoryReport(
        seed=seed,
        violations=tuple(found),
        log=tuple(storm.log),
        kinds=tuple(storm.kinds),
        turns=len(stored),
        committed=sum(turn.status is TurnStatus.COMMITTED for turn in stored),
        failed=sum(turn.status is TurnStatus.FAILED for turn in stored),
        moves=sum(heard.moves for agent in agents for heard in agent.turns),
        losses=sum(agent.losses for agent in agents),
        forks=sum(agent.forks for agent in agents),
        suspensions=sum(agent.suspensions for agent in agents),
        closed=sum(agent.closed for agent in agents),
        purged=sum(agent.purged for agent in agents),
        virtual_s=anyio.current_time(),
    )
