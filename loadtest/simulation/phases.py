"""The phases of a history, one after another, and what must be true between them.

A safety phase is followed by a liveness phase: once nothing is broken any more, every accepted turn
must have ended, and every session must be able to run another turn (I6, I7).
"""

from __future__ import annotations

import random

import anyio
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.checkers.aftermath import (
    check_agent,
    check_closed,
    check_gone,
    check_named_apart,
    check_replicas,
    check_seeds,
)
from loadtest.simulation.checkers.bounds import Bounds, check_idle
from loadtest.simulation.checkers.forks import Forks, check_forks
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.clients.agents import PATIENCE_S, Agent
from loadtest.simulation.clients.client import TURN_S
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.clients.lifecycle import close, live
from loadtest.simulation.faults import Storm
from loadtest.simulation.loop import true_time
from loadtest.simulation.world import START_US, World
from statestore.records import Turn

SETTLE_S = 4.0
"""Longer than a lease and an amnesty: afterwards everybody knows who lives."""
LIVENESS_S = 10.0
EXPORT_LEASE_S = 35.0
"""Longer than pages are held for a peer that does not come for them."""
DEADLINE_SLACK_S = 8.0
"""A turn past its deadline that nobody runs is ended by a sweep: within its period, after the lease
of a leader that died."""
RECONCILE_S = 75.0
"""By then a replica that could not be told knows that a session is closed (twice its period)."""


async def live_and_judge(
    seed: int,
    storm_s: float,
    turns: int,
    built: World,
    agents: list[Agent],
    storm: Storm,
    bounds: Bounds,
    witness: Witness,
    forks: Forks,
    found: list[str],
) -> list[Turn]:
    """Agents run ``turns`` turns each while things break, for ``storm_s``; all is mended and judged
    then. Adds what is wrong to ``found``. Returns the turns that are in the store in the end."""
    found += await _work_in_a_storm(storm_s, turns, agents, storm, bounds)
    healed_s = true_time()
    async with bounds.watched():
        found += await _liveness(agents)
    if check_replicas(built):
        await anyio.sleep(EXPORT_LEASE_S)  # a puller was killed: what it was to have waits
    found += await _check_deadlines(built, agents, witness, healed_s)
    found += [*check_replicas(built), *check_idle(built)]
    found += await _close_some(built, agents, random.Random(f"{seed} close"))
    if check_gone(built, agents):
        await anyio.sleep(RECONCILE_S)
    found += check_gone(built, agents)
    for agent in agents:
        found += await check_agent(built, agent)
    found += await check_forks(built, forks, [agent.session_id for agent in agents])
    found += [*await check_seeds(built, agents), *await check_named_apart(built, agents)]
    sessions = [await built.store.get_session(agent.session_id) for agent in agents]
    return [
        turn
        for session in sessions
        if session is not None
        for turn in await built.store.get_turns(session, 0, 1000)
    ]


async def _work_in_a_storm(
    storm_s: float, turns: int, agents: list[Agent], storm: Storm, bounds: Bounds
) -> list[str]:
    limit_s = storm_s + turns * (TURN_S + PATIENCE_S)
    with anyio.move_on_after(limit_s) as scope:
        async with bounds.watched(), anyio.create_task_group() as tasks:
            for agent in tuple(agents):
                tasks.start_soon(live, agent, agents, turns, name=agent.name)
            async with anyio.create_task_group() as faults:
                await storm.blow(faults)
            await storm.mend()
    if scope.cancelled_caught:
        await storm.mend()  # what is judged next asks until it is answered
    await anyio.sleep(SETTLE_S)
    return ["I7: the agents did not come to an end"] if scope.cancelled_caught else []


async def _liveness(agents: list[Agent]) -> list[str]:
    """Every session that is open runs one more turn, and it succeeds: those too whose client has
    left, for another client that knows nothing."""
    found: list[str] = []

    async def again(agent: Agent) -> None:
        started, agent.stalls = true_time(), False
        if agent.vanished:
            agent.asked_twice, agent.known_head = True, None
        await agent.turn()
        took = true_time() - started
        why = _needless_failure(agent.turns[-1])
        if why is not None:
            found.append(f"{agent.session_id}: I7: a healthy turn failed: {why}")
        # Another turn that it asked for and gave up may be in the way until its deadline (P4).
        if took > LIVENESS_S + (TURN_S if agent.asked_twice else 0.0):
            found.append(f"{agent.session_id}: I7: a healthy turn took {took:.1f} s")

    async with anyio.create_task_group() as tasks:
        for agent in agents:
            if not (agent.closed or agent.brief):
                tasks.start_soon(again, agent, name=f"{agent.name} again")
    await anyio.sleep(SETTLE_S)
    return found


def _needless_failure(heard: TurnHeard) -> str | None:
    """How a turn failed while nothing was broken; None if it did not, or had a short limit."""
    done = heard.finished
    if done is None or done.status != pb.TURN_STATUS_FAILED:
        return None
    if done.reason == pb.FINISH_REASON_DEADLINE and heard.request.timeout_ms < 1000 * LIVENESS_S:
        return None
    return done.error or pb.FinishReason.Name(done.reason)


async def _check_deadlines(
    built: World, agents: list[Agent], witness: Witness, healed_s: float
) -> list[str]:
    """Turns that their clients gave up (they were told of a loss) end by their deadline too."""
    found: list[str] = []
    for agent in agents:
        session = await built.store.get_session(agent.session_id)
        if session is not None and session.active_turn_id is not None:
            turn = await built.store.get_turn(session.session_id, session.active_turn_id)
            if turn is not None:
                due_s = (turn.deadline_at_ms * 1000 - START_US) / 1_000_000
                await anyio.sleep(max(0.0, due_s + DEADLINE_SLACK_S - true_time()))
                if witness.runs(session.session_id, session.active_turn_id):
                    late = f"P4: {session.active_turn_id} was due at {due_s:.3f} s and runs on"
                    found.append(f"{session.session_id}: {late}")
    return found + [
        f"{it.session_id}: I7: {it.turn_id} was due at {it.deadline_s:.3f} s and ended at"
        f" {it.ended_s:.3f} s"
        for it in witness.ended
        if it.ended_s > max(it.deadline_s, healed_s) + DEADLINE_SLACK_S
    ]


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
