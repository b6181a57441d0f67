"""One fault, from sessions that are opened for it to the verdict on them.

A round opens sessions on a running fleet, gets its focus session into the wanted phase (a
breakpoint of the proxy says when), breaks something, mends it, waits for every turn's end, runs one
more turn in every session, and has all of it judged.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus
from sessile.v1 import fleet_pb2

from statestore import keys
from tests.faults.agents import Agent, Door, Heard, quietly
from tests.faults.breakpoints import Breakpoint, Sighting, Verdict, Way
from tests.faults.children import Child
from tests.faults.fleet import Fleet, Node
from tests.faults.proof import Unproven, until
from tests.faults.sdk_agents import SdkAgent
from tests.faults.verdict import Tally, Watch, judge, replicas, undisturbed

log = logging.getLogger(__name__)

PHASE_S = 30.0
"""Limit for a phase to be reached."""
ROUND_S = 150.0
"""Limit of a round: over it, it hangs."""
NEXT_TURN_S = 15.0
"""Limit of a turn once everything is mended."""
LONGEST_GAP_S = 10.0
"""No client waits longer for its next token: twice the worst that was seen, of a path that is half
open until a keepalive ends it."""
LONG_PROMPT = 6000
AGENTS = 3
"""Sessions of a round; the client of one of them is the SDK."""


@dataclass
class Outcome:
    """What a round gave."""

    name: str
    index: int
    proofs: list[str] = field(default_factory=list)
    unproven: str = ""
    tally: Tally = field(default_factory=Tally)
    losses: int = 0
    fleet_lost: bool = False
    """The fleet could not be brought back; the next round needs another one."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.unproven or self.tally.violations or self.tally.hung)


@dataclass
class Reached:
    """A phase under way. ``point`` holds traffic, or held none."""

    victim: Node
    point: Breakpoint | None = None
    late: bool = False
    """What is held goes on only when the victim has been replaced."""
    drop: bool = False
    """What is held is lost."""

    def let_go(self) -> None:
        if self.point is not None:
            self.point.decide(Verdict.DROP if self.drop else Verdict.PASS)


class Round:
    """The state of one round; scenarios get it as their only argument."""

    def __init__(self, fleet: Fleet, index: int, draw: random.Random, tasks: TaskGroup) -> None:
        self.fleet = fleet
        self.proxy = fleet.proxy
        self.index = index
        self.draw = draw
        self.tasks = tasks
        self.agents: list[Agent] = []
        self.focus: Agent
        self.focus_turn: Heard | None = None
        self.focus_done = anyio.Event()
        self.bystanders_done: list[anyio.Event] = []
        self.proofs: list[str] = []
        self.may_be_told: set[str] = set()
        """Agents that may be told of a loss: whoever could repair it is gone too."""
        self._started_at = anyio.current_time()

    def prove(self, what: str) -> None:
        self.proofs.append(f"{anyio.current_time() - self._started_at:7.3f} {what}")

    # -- turns --------------------------------------------------------------------------------

    def start_focus(
        self,
        *,
        tokens: int = 60,
        prompt_chars: int = 30,
        on_token: Callable[[Heard], None] | None = None,
    ) -> Heard:
        """Starts the focus agent's turn; ``focus_done`` is set at its end."""
        self.focus_done = anyio.Event()
        turn = self.focus_turn = self.focus.next_turn(tokens=tokens, prompt_chars=prompt_chars)
        turn.on_token = on_token
        self.tasks.start_soon(self._run, self.focus, turn, self.focus_done)
        return turn

    async def _run(self, agent: Agent, heard: Heard, done: anyio.Event) -> None:
        await agent.run(heard)
        done.set()

    def start_bystanders(self) -> None:
        for agent in self.agents:
            if agent is not self.focus:
                done = anyio.Event()
                self.bystanders_done.append(done)
                self.tasks.start_soon(self._stand_by, agent, done)

    async def _stand_by(self, agent: Agent, done: anyio.Event) -> None:
        for _ in range(2):
            await agent.turn(tokens=self.draw.randrange(20, 60))
        done.set()

    # -- what the store says ------------------------------------------------------------------

    async def ownership(self, agent: Agent) -> tuple[bytes, bytes, bytes]:
        """(epoch, replica, incarnation), read raw."""
        epoch, owner, incarnation = await self.fleet.raw.hmget(
            keys.session_key(agent.session_id), "epoch", "owner", "owner_inc"
        )
        return epoch, owner, incarnation

    async def owner(self, agent: Agent) -> Node:
        _, name, _ = await self.ownership(agent)
        if not name:
            raise Unproven(f"{agent.session_id} has no owner")
        return self.fleet.named(name.decode())

    async def replaced(self, before: tuple[bytes, bytes, bytes]) -> None:
        """Until the focus session has another owner or epoch than ``before``."""

        async def changed() -> bool:
            return await self.ownership(self.focus) != before

        await until(changed, "nobody took the session")
        epoch, owner, _ = await self.ownership(self.focus)
        self.prove(f"replaced: owner {owner.decode()} under epoch {epoch.decode()}")

    async def kill_owner(self) -> Node:
        """Kills the focus session's owner: what the store has lost of the sessions that it owned
        cannot be repaired."""
        owner = await self.owner(self.focus)
        await self.may_lose_what_it_owns(owner)
        owner.process.kill()
        await owner.process.ended()
        self.prove(f"{owner.name}, which holds them, killed")
        return owner

    async def may_lose_what_it_owns(self, owner: Node) -> None:
        """This worker will not write again in time what the store loses of its sessions."""
        for agent in self.agents:
            if agent.session_id and (await self.ownership(agent))[1] == owner.name.encode():
                self.may_be_told.add(agent.name)

    # -- phases -------------------------------------------------------------------------------

    def links(self, kind: str, nodes: list[Node]) -> list[str]:
        return [f"{kind}:{node.name}" for node in nodes]

    async def reach(self, point: Breakpoint) -> Sighting:
        """Waits for a breakpoint; its sighting is the proof."""
        try:
            with anyio.fail_after(PHASE_S):
                await point.hit.wait()
        except TimeoutError:
            self.proxy.disarm(point)
            raise Unproven("the breakpoint was never reached") from None
        assert point.sighting is not None
        held = ", held" if point.holds else ""
        self.prove(f"phase reached: {point.sighting}{held}")
        return point.sighting

    def appends(self, link: str, turn: Heard) -> int:
        """Appends of a turn that a link has seen."""
        return sum(
            s.way is Way.UP
            and s.script == "append"
            and s.session_id == turn.session_id
            and s.args[2] == turn.turn_id.encode()
            for s in self.proxy.links[link].seen
        )

    def is_append(self, commit: bool, nth: int = 1) -> Callable[[Sighting], bool]:
        """The nth append of the focus session that a link sees from now on."""
        seen = 0

        def when(sighting: Sighting) -> bool:
            nonlocal seen
            if sighting.script != "append" or sighting.session_id != self.focus.session_id:
                return False
            if sighting.commits is not commit:
                return False
            seen += 1
            return seen >= nth

        return when

    async def restart(self, node: Node) -> Child:
        child = await self.fleet.start(node)
        self.prove(f"{node.name} started again")
        return child


Scenario = Callable[[Round], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FaultClass:
    """Who is hit, in which phase, by what, over which store."""

    name: str
    scenario: Scenario
    store: str = "everysec"
    lossy: bool = False
    """The store itself loses acknowledged writes in it."""
    opens_itself: bool = False
    """The scenario opens the focus session."""
    focus_prompt: int = 30
    """Characters of the focus session's first prompt."""
    longest_gap_s: float = LONGEST_GAP_S
    """No client waits longer for its next token."""
    silences_gateways: bool = False
    """Clients have to notice by themselves that their gateway does not speak any more."""
    plain_focus: bool = False
    """The scenario meddles with the focus agent's connections."""


async def play(fleet: Fleet, cls: FaultClass, index: int, seed: str) -> Outcome:
    """Plays one round. Never raises for what the fleet did wrong: the outcome says it."""
    outcome = Outcome(cls.name, index)
    draw = random.Random(f"{seed} {cls.name} {index}")
    endpoints = {
        node.name: fleet.proxy.links[f"client:{node.name}"].endpoint for node in fleet.gateways
    }
    by_sdk = {AGENTS - 1} if index % 3 != 1 or cls.plain_focus else {0}
    made = [
        (SdkAgent if i in by_sdk else Agent)(
            f"{cls.name}-{index}-{draw.randrange(1 << 32):08x}-{i}",
            endpoints,
            draw,
            lossy=cls.lossy,
        )
        for i in range(AGENTS)
    ]
    for agent in made if not fleet.engine.knows_its_tokens else ():
        agent.temperatures = [0.0]
    started = anyio.current_time()
    round_: Round | None = None
    watch = Watch(fleet, made, lossy=cls.lossy)
    try:
        with anyio.fail_after(ROUND_S):
            await healthy(fleet, made[0].doors)
            async with anyio.create_task_group() as tasks:
                round_ = Round(fleet, index, draw, tasks)
                round_.agents, round_.focus = made, made[0]
                for agent in made:
                    agent.prefer(draw.choice(sorted(endpoints)))
                    if not (cls.opens_itself and agent is round_.focus):
                        await agent.open()
                        prompt = cls.focus_prompt if agent is round_.focus else 30
                        await agent.turn(tokens=5, prompt_chars=prompt)
                round_.start_bystanders()
                watching = await tasks.start(_watched, watch)
                try:
                    await cls.scenario(round_)
                except Unproven as error:
                    outcome.unproven = str(error)
                finally:
                    mend(fleet)
                    watching.cancel()
            # A fail-over hides well that a process has ended by itself.
            outcome.tally.violations += fleet.complaints()
            await revive(fleet)
            await healthy(fleet, made[0].doors)
            await _next_turns(made)
            if not fleet.engine.knows_its_tokens:
                outcome.tally.violations += await undisturbed(fleet, made)
    except Exception as error:  # noqa: BLE001 - whatever it is, the round has failed
        outcome.tally.hung += isinstance(error, TimeoutError)
        outcome.tally.violations.append(f"the round failed: {_explain(error)}")
        outcome.fleet_lost = True
        mend(fleet)
    outcome.tally.violations += watch.violations
    if not watch.looks:
        outcome.tally.violations.append("nobody looked at the sessions while things broke")
    with anyio.CancelScope(shield=True):
        if round_ is not None:
            outcome.proofs = round_.proofs
            outcome.tally.violations += [
                f"{agent.name}: told of a loss, though its owner lived: {agent.losses} times"
                for agent in made
                if agent.losses and agent.name not in round_.may_be_told
            ]
        await _conclude(fleet, made, outcome)
        outcome.tally.violations += fleet.complaints()
    for agent in made:
        limit_s = cls.longest_gap_s + agent.notices_silence_s * cls.silences_gateways
        waited_s = max((heard.worst_gap_s for heard in agent.turns), default=0.0)
        if waited_s > limit_s:
            outcome.tally.violations.append(
                f"{agent.name}: I7: waited {waited_s:.2f} s for its next token, not {limit_s:.2f}"
            )
    outcome.losses = sum(agent.losses for agent in made)
    outcome.seconds = anyio.current_time() - started
    return outcome


async def _watched(watch: Watch, *, task_status: TaskStatus[anyio.CancelScope]) -> None:
    with anyio.CancelScope() as scope:
        task_status.started(scope)
        await watch.run()


async def _next_turns(agents: list[Agent]) -> None:
    """I6, I7: with everything mended, each session runs its next turn soon."""

    async def next_turn(agent: Agent) -> None:
        began = anyio.current_time()
        await agent.turn(tokens=8)
        if anyio.current_time() - began > NEXT_TURN_S:
            agent.violations.append(f"I6: the next turn took {anyio.current_time() - began:.1f} s")

    async with anyio.create_task_group() as tasks:
        for agent in agents:
            tasks.start_soon(next_turn, agent)


async def _conclude(fleet: Fleet, agents: list[Agent], outcome: Outcome) -> None:
    try:
        with anyio.fail_after(60.0):
            tally = await judge(fleet, agents)
            tally.violations += outcome.tally.violations
            tally.hung += outcome.tally.hung
            outcome.tally = tally
            for agent in agents:
                if agent.session_id:
                    await agent.close()
    except Exception as error:  # noqa: BLE001 - whatever it is, the round has failed
        outcome.tally.violations.append(f"the verdict failed: {_explain(error)}")
    finally:
        for agent in agents:
            await agent.aclose()


def _explain(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_explain(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {error}"


# -- the fleet between rounds ------------------------------------------------------------------


def mend(fleet: Fleet) -> None:
    """Ends every fault of the network, and wakes whoever sleeps."""
    fleet.proxy.heal()
    for node in fleet.nodes.values():
        if node.child is not None and node.child.stopped:
            node.child.wake()


async def revive(fleet: Fleet) -> None:
    """Starts every node whose process has ended."""
    for node in fleet.nodes.values():
        if node.child is not None and not node.child.running:
            await node.child.ended()
            await fleet.start(node)


async def healthy(fleet: Fleet, doors: list[Door]) -> None:
    """Until every gateway sees every worker READY, by the name of its present process."""
    names = {node.name for node in fleet.workers}
    ready = fleet_pb2.REPLICA_STATE_READY
    with anyio.fail_after(60.0):
        for door in doors:
            while True:
                answer = await quietly(replicas(door))
                if isinstance(answer, dict):
                    up = {name for name, seen in answer.items() if seen.state == ready}
                    if up >= names:
                        break
                await anyio.sleep(0.1)


async def wait_all(events: list[anyio.Event], limit_s: float = ROUND_S) -> None:
    with anyio.fail_after(limit_s):
        for event in events:
            await event.wait()


async def migrate(door: Door, agent: Agent, target: Node, timeout_s: float = 4.0) -> Any:
    """An operator's move; its answer or error."""
    request = fleet_pb2.MigrateSessionRequest(
        session_id=agent.session_id,
        target_replica_id=target.name,
        timeout_ms=int(timeout_s * 1000),
    )
    return await quietly(door.fleet.MigrateSession(request, timeout=timeout_s + 2.0))
