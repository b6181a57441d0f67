"""The faults and moves of the demo, each at a moment that makes it hard: in mid-turn, in mid-gap.

They come one after another, each when enough turns have ended, and wait for the state that they
need (a turn with ten tokens delivered and more to come; an agent in its tool gap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
from sessile import DrainProgress, Migration, ReplicaState, Sessile, SessileError

from gateway.cli.launch import Child, Cluster, LaunchFailed
from loadtest.demo.board import AgentState, Board, Found, Phase, TurnLog

DELIVERED_BEFORE_KILL = 10
"""Tokens that a turn on the killed replica has delivered, at least."""
LEFT_AT_KILL = 4
"""Tokens that it has still to deliver, at least."""
MOMENT_TIMEOUT_S = 120.0
"""A fault whose moment does not come within this time has failed."""
DRAIN_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 20.0
JOIN_TIMEOUT_S = 30.0
"""Between a worker's start and a gateway's seeing it."""
POLL_S = 0.05


class FaultImpossible(Exception):
    """The moment that a fault needs did not come, or it had no effect."""


@dataclass(frozen=True, slots=True)
class IdleMove:
    """An idle session moved on an operator's demand. ``next_turn`` is the index of the agent's
    first turn after it."""

    agent: AgentState
    migration: Migration
    next_turn: int


@dataclass(frozen=True, slots=True)
class Kill:
    """A SIGKILL. ``delivered`` are the tokens that the agent had received of the turn that was
    seen running on (or streaming through) the victim."""

    victim: str
    at_s: float
    turn_id: str
    delivered: int


@dataclass(frozen=True, slots=True)
class Drained:
    """How a drain ended. ``exit_code`` is the process's, None if it did not end in time."""

    replica: str
    progress: DrainProgress
    duration_s: float
    exit_code: int | None


@dataclass(slots=True)
class Faults:
    """What was done. Times are the event loop's, in seconds."""

    idle_moves: list[IdleMove] = field(default_factory=list)
    replica_kill: Kill | None = None
    gateway_kill: Kill | None = None
    drained: Drained | None = None
    joined: str = ""
    failures: list[str] = field(default_factory=list)


class Director:
    """Runs the faults over a cluster, with an operator's client of its own. ``total_turns`` is
    what the agents will do at least, ``turn_tokens`` what each turn delivers at least."""

    def __init__(
        self,
        cluster: Cluster,
        operator: Sessile,
        board: Board,
        *,
        total_turns: int,
        turn_tokens: int,
    ) -> None:
        self.faults = Faults()
        self._cluster = cluster
        self._operator = operator
        self._board = board
        self._total_turns = total_turns
        self._turn_tokens = turn_tokens

    async def run(self) -> None:
        """Everything, in order; what fails is noted and does not stop the rest."""
        async with anyio.create_task_group() as tasks:
            await self._at(0.15, "move an idle session", self._move_idle_session)
            await self._at(0.25, "kill a replica", self._kill_replica)
            tasks.start_soon(self._at, 0.4, "let a replica join", self._join)
            await self._at(0.5, "kill a gateway", self._kill_gateway)
        await self._at(0.6, "move an idle session to the new replica", self._move_to_joined)
        await self._at(0.7, "drain a replica", self._drain_replica)
        self._board.faults_done = True
        self._board.changed()

    async def _at(self, share: float, what: str, fault: Callable[[], Awaitable[None]]) -> None:
        """Runs a fault when this share of the turns has ended."""
        turns = share * self._total_turns
        try:
            await self._board.wait_for(
                lambda: True if self._board.finished_turns >= turns else None
            )
            await fault()
        except (FaultImpossible, SessileError, LaunchFailed, TimeoutError) as error:
            failure = f"could not {what}: {type(error).__name__}: {error}"
            self.faults.failures.append(failure)
            self._board.say(failure, fault=True)

    async def _moment(self, what: str, find: Callable[[], Found | None]) -> Found:
        with anyio.move_on_after(MOMENT_TIMEOUT_S):
            return await self._board.wait_for(find)
        raise FaultImpossible(f"no moment came with {what} within {MOMENT_TIMEOUT_S:g} s")

    # -- moves ----------------------------------------------------------------------------------

    async def _move_idle_session(self, target: str = "") -> None:
        agent = await self._moment("an agent in its tool gap", lambda: self._hold_idle(target))
        before = agent.finished_turns
        try:
            self._board.say(
                f"moving the idle session of {agent.name} from {agent.replica}"
                + (f" to {target}" if target else ""),
                fault=True,
            )
            migration = await self._operator.fleet.migrate(agent.session_id, target=target)
        finally:
            agent.held = False
            self._board.changed()
        self.faults.idle_moves.append(IdleMove(agent, migration, len(agent.turns)))
        if not migration.moved:
            raise FaultImpossible(migration.detail)
        self._board.say(
            f"moved {agent.name} to {migration.target}: {migration.verified_tokens} tokens of KV "
            f"verified, {migration.bytes_copied / 1e6:.1f} MB in {migration.duration_ms:.0f} ms"
        )
        # The proof of the move; a fault before it is done would spoil it.
        await self._moment(
            f"the next turn of {agent.name} at its end",
            lambda: True if agent.finished_turns > before or agent.error else None,
        )

    def _hold_idle(self, target: str) -> AgentState | None:
        """An agent that waits for its tool, kept there from now on."""
        for agent in self._board.agents:
            if agent.phase is Phase.TOOL and agent.turns and agent.replica != target:
                agent.held = True
                return agent
        return None

    async def _move_to_joined(self) -> None:
        if not self.faults.joined:
            raise FaultImpossible("no replica joined")
        await self._move_idle_session(self.faults.joined)

    async def _join(self) -> None:
        replica = f"r{len(self._cluster.workers) + 1}"
        self._board.say(f"starting a new replica {replica}", fault=True)
        await self._cluster.start_worker(replica)
        # Asked of whichever gateway answers: one of them may be killed meanwhile.
        with anyio.fail_after(JOIN_TIMEOUT_S):
            async with aclosing(self._operator.fleet.watch(interval_s=POLL_S)) as fleets:
                async for fleet in fleets:
                    if any(
                        member.ref.replica_id == replica and member.state is ReplicaState.READY
                        for member in fleet
                    ):
                        break
        self.faults.joined = replica
        self._board.say(f"{replica} has joined")

    async def _drain_replica(self) -> None:
        sessions = Counter(agent.replica for agent in self._board.agents)
        candidates = [
            child
            for child in self._cluster.workers
            if child.running and child.name != self.faults.joined
        ]
        victim = max(candidates, key=lambda child: sessions[child.name])
        self._board.say(f"draining {victim.name} ({sessions[victim.name]} sessions)", fault=True)
        await self._operator.fleet.replicas()  # finds a living gateway: a drain is not repeated
        began = anyio.current_time()
        last: DrainProgress | None = None
        async for progress in self._operator.fleet.drain(
            victim.name, timeout_s=DRAIN_TIMEOUT_S, shutdown=True
        ):
            last = progress
        if last is None:
            raise FaultImpossible("the drain ended without a word")
        duration_s = anyio.current_time() - began
        code = await _exit_code(victim)
        self.faults.drained = Drained(victim.name, last, duration_s, code)
        self._board.say(
            f"{victim.name} is empty after {duration_s:.1f} s: {last.moved_with_kv} sessions moved "
            f"with KV, {last.moved_without_kv} without; its process ended with {code}"
        )
        if last.remaining or code != 0:
            raise FaultImpossible(f"{last.remaining} sessions are left, exit code {code}")

    # -- kills ----------------------------------------------------------------------------------

    async def _kill_replica(self) -> None:
        agent, turn = await self._moment(
            "a turn in full flow", lambda: self._streaming(DELIVERED_BEFORE_KILL)
        )
        victim = next(c for c in self._cluster.workers if c.name == turn.last_replica)
        self.faults.replica_kill = self._kill(victim, turn)
        idle = sum(a.replica == victim.name and a.turn is None for a in self._board.agents)
        self._board.say(
            f"SIGKILL to {victim.name}: {agent.name} had {turn.tokens} tokens of its turn, "
            f"{idle} sessions were idle there",
            fault=True,
        )

    async def _kill_gateway(self) -> None:
        agent, turn = await self._moment("a turn in full flow", lambda: self._streaming(1))
        victim = self._cluster.gateways[agent.gateway]
        self.faults.gateway_kill = self._kill(victim, turn)
        self._board.say(
            f"SIGKILL to {victim.name}: {agent.name} had {turn.tokens} tokens of its turn",
            fault=True,
        )

    def _streaming(self, delivered: int) -> tuple[AgentState, TurnLog] | None:
        """An agent in the middle of a turn that has not moved yet."""
        for agent in self._board.agents:
            turn = agent.turn
            if (
                turn is not None
                and not turn.moved
                and delivered <= turn.tokens <= self._turn_tokens - LEFT_AT_KILL
            ):
                return agent, turn
        return None

    def _kill(self, victim: Child, turn: TurnLog) -> Kill:
        victim.kill()
        return Kill(victim.name, anyio.current_time(), turn.turn_id, turn.tokens)


async def _exit_code(child: Child) -> int | None:
    """Of a process that is about to end by itself; None if it does not in time."""
    with anyio.move_on_after(EXIT_TIMEOUT_S):
        while child.running:  # noqa: ASYNC110 - nobody tells when a child ends
            await anyio.sleep(POLL_S)
    return child.exit_code
