"""One agent: a conversation through the public client, with tool calls between its turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
from sessile import (
    Accepted,
    Finished,
    Message,
    Moved,
    Runtime,
    Sessile,
    SessileError,
    Session,
    Tokens,
    ToolCall,
    TurnEvent,
)

from loadtest.demo.board import AgentState, Arrival, Board, Phase, TurnLog
from loadtest.demo.tasks import FINAL_STEP, SYSTEM_PROMPT, Step, run_tool, steps

TENANT = "demo"
TURN_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How much work an agent makes, and how fast."""

    agents: int
    turns: int
    """At least; more while faults are still to come, ``max_turns`` at most."""
    max_turns: int
    min_output_tokens: int
    max_output_tokens: int
    result_chars: int
    """Longest tool result."""
    gap_s: tuple[float, float]
    """How long a tool takes: drawn between these."""
    arrival_s: float
    """Between the starts of two agents."""


def make_agents(modules: Sequence[str], gateways: int) -> list[AgentState]:
    """One agent a module; their clients start at the gateways in turn."""
    return [
        AgentState(f"agent-{number + 1}", module, number % gateways)
        for number, module in enumerate(modules)
    ]


def _choosing(first: int, of: int) -> random.Random:
    """Randomness whose first choice among ``of`` gateways is ``first`` (clients pick theirs at
    random; the demo has to know who is where)."""
    return next(
        random.Random(seed)
        for seed in itertools.count()
        if random.Random(seed).randrange(of) == first
    )


async def run_agent(
    agent: AgentState, number: int, targets: Sequence[str], pace: Pace, board: Board
) -> None:
    """Works until the task is done; a failure is noted in the agent's state."""
    try:
        await anyio.sleep(number * pace.arrival_s)
        runtime = Runtime(rng=_choosing(agent.gateway, len(targets)))
        async with Sessile(targets, tenant=TENANT, runtime=runtime) as client:
            session = await client.open(
                system=SYSTEM_PROMPT,
                labels={"agent": agent.name},
                temperature=0.7,
                top_p=0.95,
                seed=number,
                min_tokens=pace.min_output_tokens,
                max_tokens=pace.max_output_tokens,
            )
            agent.session_id = session.session_id
            await _work(agent, session, random.Random(number), pace, board)
    except SessileError as error:
        agent.phase, agent.error = Phase.FAILED, f"{type(error).__name__}: {error}"
        board.say(f"{agent.name} FAILED: {agent.error}", fault=True)
    board.changed()


async def _work(
    agent: AgentState, session: Session, rng: random.Random, pace: Pace, board: Board
) -> None:
    for step in steps(agent.module):
        await _turn(agent, session, step, pace, board)
        await _gap(agent, rng.uniform(*pace.gap_s), board)
        turns = len(agent.turns) + 1
        if turns >= pace.max_turns:
            await board.wait_for(lambda: board.faults_done or None)
        if turns >= pace.turns and board.faults_done:
            break
    await _turn(agent, session, FINAL_STEP, pace, board)
    agent.phase, agent.activity = Phase.DONE, ""


async def _gap(agent: AgentState, seconds: float, board: Board) -> None:
    """The pause in which an agent's tool runs; longer if the director holds the agent."""
    agent.phase = Phase.TOOL
    board.changed()
    await anyio.sleep(seconds)
    await board.wait_for(lambda: True if not agent.held else None)


def _messages(step: Step, turn: int, pace: Pace) -> list[Message]:
    if step.call is None:
        return [Message.user(step.question)]
    call = ToolCall(f"call_{turn}", step.call.tool, "{}")
    return [
        Message.tool(call, f"{step.call}\n{run_tool(step.call, pace.result_chars)}"),
        Message.user(step.question),
    ]


async def _turn(agent: AgentState, session: Session, step: Step, pace: Pace, board: Board) -> None:
    messages = _messages(step, len(agent.turns), pace)
    turn = session.run(messages, timeout_s=TURN_TIMEOUT_S)
    log = TurnLog(turn.turn_id, anyio.current_time())
    agent.turns.append(log)
    agent.phase, agent.activity = Phase.RUNNING, str(step.call or step.question)
    board.changed()
    async with turn:
        async for event in turn:
            note(log, event, anyio.current_time())
            if isinstance(event, Moved):
                board.say(
                    f"{agent.name} goes on at {event.target} after {log.tokens} tokens "
                    f"({event.reason}, was at {event.source})"
                )
            board.changed()
        log.result = await turn.result()


def note(log: TurnLog, event: TurnEvent, at_s: float) -> None:
    """Writes one event down, as received."""
    match event:
        case Accepted():
            log.replica = event.replica.replica_id
            log.output_start = event.output_start.length
            log.cached_tokens = event.cached_tokens
        case Tokens():
            log.arrivals.append(Arrival(at_s, event.position, event.token_ids))
        case Moved():
            log.moved.append((at_s, event))
        case Finished():
            log.finished = event
