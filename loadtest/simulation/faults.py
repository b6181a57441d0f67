"""Kinds of faults. Each breaks something and mends it again after a while; what exactly is drawn
from the fault's own seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sessile.v1 import replica_pb2, session_pb2, types_pb2

from gateway.app.migration import MoveOptions
from gateway.core.errors import NotFound, SessileError
from loadtest.simulation.agents import TENANTS, Agent
from loadtest.simulation.coverage import Row
from loadtest.simulation.lifecycle import fork, run_once
from loadtest.simulation.loop import current_process, outside
from loadtest.simulation.network import STORE, Call, SimReplicaClient
from loadtest.simulation.schedule import Fault
from loadtest.simulation.world import SimGateway, SimReplica, World

DRAIN_S = 4.0
MAX_LOSS_S = 0.4
"""Acknowledged writes that a fail-over of the store may lose were made within this time."""
BURST = 8
"""Sessions that are opened at once."""
MAX_KILLED = 2
"""Replicas that one turn may kill in a row before it is given up, as scripts are told."""
SAY_S = 3.0
"""How long a fault waits for a turn of its own."""
RESTART_S = 0.3
"""Until a process that refused to start is started again."""
OPERATOR_S = 8.0
"""How long an operator waits for one call."""


class Storm:
    """Breaks the world by a schedule. ``log`` says what was done to whom."""

    def __init__(self, world: World, agents: list[Agent], schedule: Sequence[Fault]) -> None:
        self.log: list[str] = []
        self.schedule = schedule
        self._losing = anyio.Lock()
        """Held from before the store is as it will be again, until it is."""
        self._world = world
        self._agents = agents

    async def blow(self, tasks: TaskGroup) -> None:
        """Starts each fault at its time; each runs in ``tasks`` until it is mended."""
        began = anyio.current_time()
        for fault in self.schedule:
            await anyio.sleep(max(0.0, began + fault.at_s - anyio.current_time()))
            self._note(fault.kind)
            tasks.start_soon(FAULTS[fault.kind], self, random.Random(fault.seed))

    async def mend(self) -> None:
        """Ends everything that is still broken, and restarts what is down."""
        self._note("mend")
        world = self._world
        world.weather.down = world.weather.restarting = False
        world.weather.evicting = world.weather.cancel_at_switch = False
        world.weather.switch_late_s = 0.0
        world.weather.request_lost = world.weather.reply_lost = 0.0
        world.network.heal()
        nodes: list[SimReplica | SimGateway] = [*world.replicas.values(), *world.gateways.values()]
        for node in nodes:
            node.process.set_clock(1.0)
        for name, replica in sorted(world.replicas.items()):
            if replica.process.stopped and not replica.ended:
                replica.process.resume()
            if replica.ended:
                await world.start_replica(name)
        for name, gateway in sorted(world.gateways.items()):
            if gateway.ended:
                world.start_gateway(name)
        for replica in world.live_replicas():
            replica.engine.slow_down(1.0)
            await self._undrain(replica)

    # -- kinds --------------------------------------------------------------------------------

    async def kill_replica(self, draw: random.Random) -> None:
        """A process dies, and a new one takes its name."""
        victim = self._replica(draw)
        if victim is not None:
            self._note(f"kill {victim.name}")
            self._world.kill(victim)
            await self._pause(draw, 0.1, draw.choice((1.0, 3.0, 6.0)))
            await self._replace(victim)

    async def stop_replica(self, draw: random.Random) -> None:
        """A process is asked to end (SIGTERM), and a new one takes its name."""
        victim = self._replica(draw)
        if victim is not None:
            self._note(f"stop {victim.name}")
            victim.process.run(victim.stop.set)
            await self._pause(draw, 0.5, 3.0)
            if not victim.ended:
                self._world.kill(victim)
            await self._replace(victim)

    async def freeze_replica(self, draw: random.Random) -> None:
        """A process stops and goes on later, perhaps after it has been replaced."""
        victim = self._replica(draw)
        if victim is None:
            return
        self._note(f"freeze {victim.name}")
        victim.process.stop()
        replaced = draw.random() < 0.3
        await self._pause(draw, 0.2, 3.0)
        if replaced and self._world.replicas[victim.name] is victim:
            await self._world.start_replica(victim.name)
            await self._pause(draw, 0.2, 3.0)
        if not victim.ended:
            self._note(f"thaw {victim.name}")
            victim.process.resume()

    async def kill_gateway(self, draw: random.Random) -> None:
        """A gateway dies and is restarted; the other one stays."""
        live = self._world.live_gateways()
        if len(live) > 1:
            victim = draw.choice(live)
            if victim.app.turns.open_streams:
                self._saw(Row.GATEWAY_DIES)
            self._world.kill(victim)
            await self._pause(draw, 0.05, 1.0)
            while self._world.gateways[victim.name] is victim:
                self._world.start_gateway(victim.name)
                victim = self._world.gateways[victim.name]
                await anyio.sleep(RESTART_S)
                if not victim.ended:
                    return

    async def flaky_store(self, draw: random.Random) -> None:
        """Requests and replies get lost."""
        weather = self._world.weather
        weather.request_lost, weather.reply_lost = draw.uniform(0, 0.2), 0.2
        await self._pause(draw, 0.2, 2.0)
        weather.request_lost = weather.reply_lost = 0.0

    async def store_outage(self, draw: random.Random) -> None:
        """Nobody gets an answer."""
        self._world.weather.down = True
        await self._pause(draw, 0.1, draw.choice((1.0, 3.0, 12.0)))
        self._world.weather.down = False

    async def cut(self, draw: random.Random) -> None:
        """Two processes do not hear each other, while both hear everybody else."""
        replicas = sorted(self._world.replicas)
        one = draw.choice(replicas)
        other = draw.choice([n for n in [*replicas, *sorted(self._world.gateways)] if n != one])
        self._note(f"cut {one} {other}")
        self._world.network.cut(one, other)
        await self._pause(draw, 0.2, 4.0)
        self._world.network.join(one, other)
        self._world.network.join(other, one)

    async def drain(self, draw: random.Random) -> None:
        """An operator empties a replica, which then ends and is started again."""
        victim = self._replica(draw)
        if victim is None:
            return
        self._note(f"drain {victim.name}")
        await self._drain(draw, victim, shutdown=True)
        await self._pause(draw, 0.2, 0.5)
        if victim.ended:
            self._saw(Row.DRAIN_ENDS)
        elif self._world.replicas[victim.name] is victim:
            self._world.kill(victim)  # what it still has is taken over
        await self._replace(victim)

    async def migrate(self, draw: random.Random) -> None:
        """An operator moves a session."""
        agents = [agent for agent in self._agents if agent.session_id and not agent.closed]
        if not agents:
            return
        agent = draw.choice(agents)
        async with anyio.create_task_group() as tasks:
            for _ in range(draw.choice((1, 1, 2, 4))):  # operators do not know of each other
                agent = draw.choice((agent, draw.choice(agents)))
                target = draw.choice(sorted(self._world.replicas))
                tasks.start_soon(self._migrate, agent, target, self._gateway(draw))
            victim = self._world.replicas.get(target)
            if draw.random() < 0.25 and victim in self._world.live_replicas()[1:]:
                await self._pause(draw, 0.0, 0.03)
                if victim is not None and not victim.ended:
                    self._note(f"kill {victim.name}")
                    self._world.kill(victim)
                    await self._pause(draw, 0.1, 1.0)
                    await self._replace(victim)

    async def _migrate(self, agent: Agent, target: str, gateway: str) -> None:
        async def move(app: Any) -> Any:
            session = await app.store.get_session(agent.session_id)
            if session is None:
                raise NotFound("it was purged")
            return await app.migrations.migrate(session, MoveOptions(target, 3.0))

        try:
            result = await self._world.network.unary(gateway, move, 8.0)
            self._note(f"migrate {agent.session_id} to {target}: {result.moved} {result.detail}")
        except SessileError as error:
            self._note(f"migrate {agent.session_id} to {target}: {error}")

    async def corrupt_pages(self, draw: random.Random) -> None:
        """KV arrives with wrong bytes."""
        self._world.network.corrupt_page_rate = 0.2
        await self._pause(draw, 0.5, 3.0)
        self._world.network.corrupt_page_rate = 0.0

    async def lose_writes(self, draw: random.Random) -> None:
        """The store fails over and forgets what it has just acknowledged."""
        async with self._losing:
            if self._any_is_new():
                return
            before = self._world.server.snapshot()
            await self._pause(draw, 0.02, MAX_LOSS_S)
            self._note("writes are lost")
            self._world.server.restore(before)

    async def lose_writes_and_owner(self, draw: random.Random) -> None:
        """The same, and a replica that could have repaired what it wrote dies too."""
        await self.lose_writes(draw)
        await self.kill_replica(draw)

    async def lose_a_move(self, draw: random.Random) -> None:
        """The store forgets that a session was moved and ran a turn where it went; another client
        has the old owner run a turn; while it does, somebody asks the new owner again, which goes
        back to what it wrote itself (P2)."""
        mover, other = draw.sample(sorted(self._world.gateways), 2)
        async with self._losing:
            agent = await self._short_lived(draw)
            await self._say(agent, other, "t0", 8)
            if self._any_is_new():
                return
            session = await self._world.store.get_session(agent.session_id)
            owner = None if session is None else session.owner
            here = "" if owner is None else owner.replica.replica_id
            target = draw.choice([name for name in sorted(self._world.replicas) if name != here])
            before = self._world.server.snapshot()
            await self._migrate(agent, target, mover)
            await self._say(agent, mover, "t1", 2)
            self._note(f"the move of {agent.session_id} is lost")
            self._world.server.restore(before)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._say, agent, other, "t2", 60)
            await self._pause(draw, 0.1, 0.3)
            await self._say(agent, mover, "t3", 2)

    async def lose_a_turn(self, draw: random.Random) -> None:
        """The store forgets a turn, whose replica dies; a proxy repeats its request, and other
        tokens of the same number take their place: the client that has the first must be told
        (P1)."""
        gateway = self._gateway(draw)
        async with self._losing:
            agent = await self._short_lived(draw)
            await self._say(agent, gateway, "t0", 8)
            if self._any_is_new():
                return
            before = self._world.server.snapshot()
            first = await self._say(agent, gateway, "t1", 8)
            session = await self._world.store.get_session(agent.session_id)
            owner = None if session is None else session.owner
            victim = self._world.replicas.get("" if owner is None else owner.replica.replica_id)
            if first is None or victim is None or len(self._world.live_replicas()) < 2:
                return
            self._note(f"a turn of {agent.session_id} is lost, kill {victim.name}")
            self._world.server.restore(before)
            self._world.kill(victim)
        again = await self._say(agent, gateway, "t1", 8)
        if again is not None and again.end != first.end:
            last = await self._say(agent, gateway, "t2", 2, knows=first.end)
            agent.expect(last is None, f"P1: who knew of other tokens was told {last}")
        await self._replace(victim)

    async def _short_lived(self, draw: random.Random) -> Agent:
        """A session of which the fault alone knows what is to become."""
        name, own = f"l{draw.getrandbits(24)}", random.Random(draw.random())
        agent = Agent(self._world, name, own, lossy=True, brief=True)
        self._agents.append(agent)
        await agent.open()
        await anyio.sleep(2 * MAX_LOSS_S)
        return agent

    async def _say(
        self,
        agent: Agent,
        gateway: str,
        turn_id: str,
        tokens: int,
        knows: types_pb2.Position | None = None,
    ) -> types_pb2.TurnFinished | None:
        """One turn of so many tokens; None if it did not come to its end."""
        request = types_pb2.RunTurnRequest(
            session_id=agent.session_id,
            turn_id=turn_id,
            messages=[types_pb2.Message(role=types_pb2.Message.ROLE_USER, content=turn_id)],
            params=types_pb2.SamplingParams(max_tokens=tokens, temperature=1, ignore_eos=True),
        )
        if knows is not None:
            request.precondition.head.CopyFrom(knows)
            request.precondition.turn_index = 2

        async def handler(app: Any, call: Call) -> None:
            await app.turns.run(agent.tenant, request, SAY_S, call.put)

        try:
            async with aclosing(self._world.network.stream(gateway, handler, SAY_S)) as stream:
                async for message in stream:
                    for event in types_pb2.TurnStream.FromString(message).events:
                        if event.HasField("finished"):
                            return event.finished
        except SessileError as error:
            self._note(f"{turn_id} of {agent.session_id}: {error}")
        return None

    def _any_is_new(self) -> bool:
        """Clients would have to open their sessions again, if the store lost its last writes."""
        now = anyio.current_time()
        return any(not a.session_id or now - a.opened_at < 2 * MAX_LOSS_S for a in self._agents)

    async def reset_streams(self, draw: random.Random) -> None:
        """Connections break while both of their ends live."""
        for call in self._some_calls(draw):
            call.break_off()

    async def half_open(self, draw: random.Random) -> None:
        """Connections go silent; the server believes that the client listens."""
        for call in self._some_calls(draw):
            call.go_silent()

    async def cut_one_way(self, draw: random.Random) -> None:
        """One process does not hear another, which hears it."""
        one, other = draw.sample(self._names(), 2)
        self._note(f"{other} does not hear {one}")
        self._world.network.cut_one_way(one, other)
        await self._pause(draw, 0.2, 4.0)
        self._world.network.join(one, other)

    async def cut_from_store(self, draw: random.Random) -> None:
        """One process alone does not reach the store, or does not hear its answers."""
        name, network = draw.choice(self._names()), self._world.network
        pairs = draw.choice(([(name, STORE)], [(STORE, name)], [(name, STORE), (STORE, name)]))
        self._note(f"cut {pairs}")
        for pair in pairs:
            network.cut_one_way(*pair)
        await self._pause(draw, 0.2, 4.0)
        for pair in pairs:
            network.join(*pair)

    async def duplicates(self, draw: random.Random) -> None:
        """Calls arrive twice, the second time late."""
        self._world.network.duplicate_rate = 0.3
        await self._pause(draw, 0.5, 3.0)
        self._world.network.duplicate_rate = 0.0

    async def slow_network(self, draw: random.Random) -> None:
        """Messages of one process, or all requests to the store, take up to seconds."""
        name, slowness = draw.choice([*self._names(), STORE, STORE]), self._world.network.slowness_s
        slowness[name] = draw.choice((0.05, 0.5, 2.0))
        self._note(f"{name} is slow by {slowness[name]} s")
        await self._pause(draw, 0.5, 3.0)
        slowness.pop(name, None)

    async def store_restart(self, draw: random.Random) -> None:
        """The store ends and comes back with all its data; connections break."""
        weather = self._world.weather
        if any(replica.engine.load().running for replica in self._world.live_replicas()):
            self._saw(Row.STORE_RESTARTS)
        weather.restarting = True
        weather.restarts += 1
        await self._pause(draw, 0.05, 1.0)
        weather.restarting = False

    async def skew_clocks(self, draw: random.Random) -> None:
        """Processes' clocks go slower and faster than others'."""
        nodes = self._live()
        skewed = draw.sample(nodes, draw.randrange(1, len(nodes) + 1)) if nodes else []
        for node in skewed:
            node.process.set_clock(draw.choice((0.3, 0.8, 1.25, 3.0)))
        await self._pause(draw, 1.0, 4.0)
        for node in skewed:
            if not node.ended:
                node.process.set_clock(1.0)

    async def jump_clock(self, draw: random.Random) -> None:
        """A process's clock jumps forward, as after its machine was suspended."""
        nodes = self._live()
        if nodes:
            node, jump_s = draw.choice(nodes), draw.choice((0.5, 3.0, 30.0, 600.0))
            self._note(f"the clock of {node.name} jumps by {jump_s} s")
            node.process.set_clock(node.process.rate, jump_s)

    async def slow_engine(self, draw: random.Random) -> None:
        """A replica computes as slowly as on an overloaded machine."""
        victim = self._replica(draw)
        if victim is not None:
            self._note(f"{victim.name} computes slowly")
            victim.engine.slow_down(20.0)
            await self._pause(draw, 0.5, 3.0)
            victim.engine.slow_down(1.0)

    async def evict(self, draw: random.Random) -> None:
        """A replica's cached KV is gone, under whoever counts on it."""
        victim = self._replica(draw)
        if victim is not None:
            self._note(f"{victim.name} evicts {victim.engine.evict_all()} pages")

    async def burst(self, draw: random.Random) -> None:
        """Many sessions are opened and run a turn at once."""
        async with anyio.create_task_group() as tasks:
            for index in range(draw.randrange(2, BURST + 1)):
                name = f"b{draw.getrandbits(24)}.{index}"
                own = random.Random(draw.random())
                agent = Agent(self._world, name, own, tenant=draw.choice(TENANTS), brief=True)
                self._agents.append(agent)
                tasks.start_soon(run_once, agent, name=name)

    async def poison(self, draw: random.Random) -> None:
        """A turn that kills every process that runs it, before it says anything (P10)."""
        agent = Agent(
            self._world, f"p{draw.getrandbits(24)}", random.Random(draw.random()), brief=True
        )
        agent.poison = True
        await agent.open()
        self._agents.append(agent)
        killed: list[SimReplica] = []

        def kill(session_id: str) -> None:
            victim = self._world.serving.get(process) if (process := current_process()) else None
            if session_id == agent.session_id and victim is not None and not victim.ended:
                killed.append(victim)
                outside(asyncio.get_running_loop().call_soon, self._world.kill, victim)

        self._world.server.on_turn.append(kill)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._revive, killed)
            await agent.turn()
            tasks.cancel_scope.cancel()
        self._world.server.on_turn.remove(kill)
        for victim in killed:
            await self._replace(victim)
        counted = LOSSY.isdisjoint(fault.kind for fault in self.schedule)
        few = len(killed) <= MAX_KILLED or not counted  # what was lost may have been the count
        agent.expect(few, f"P10: one turn killed {len(killed)} replicas, in a row")

    async def _revive(self, killed: list[SimReplica]) -> None:
        """Starts again what a turn has killed, for as long as it does."""
        revived = 0
        while True:
            await anyio.sleep(RESTART_S)
            for victim in killed[revived:]:
                revived += 1
                self._note(f"{victim.name} was killed by a turn")
                await self._replace(victim)

    async def evicting_store(self, draw: random.Random) -> None:
        """The store is set to drop keys when its memory is short, and set right again (P8)."""
        self._world.weather.evicting = True
        await self._pause(draw, 0.2, 2.0)
        self._world.weather.evicting = False

    async def cancel_at_switch(self, draw: random.Random) -> None:
        """Turns are cancelled just when they are handed over."""
        self._world.weather.cancel_at_switch = True
        await self._pause(draw, 0.5, 3.0)
        self._world.weather.cancel_at_switch = False

    async def late_switch(self, draw: random.Random) -> None:
        """Moves stand still just before they end: much happens to what was verified."""
        self._world.weather.switch_late_s = draw.choice((0.3, 1.0, 2.0))
        await self._pause(draw, 0.5, 3.0)
        self._world.weather.switch_late_s = 0.0

    async def drain_and_undo(self, draw: random.Random) -> None:
        """An operator empties a replica, which goes on; then it may be used again."""
        victim = self._replica(draw)
        if victim is None:
            return
        self._note(f"drain {victim.name}, which is to stay")
        await self._drain(draw, victim, shutdown=False)
        await self._pause(draw, 0.0, 1.0)
        await self._undrain(victim)

    async def operate(self, draw: random.Random) -> None:
        """An operator suspends, closes or forks a session, whatever it does just then."""
        agents = [a for a in self._agents if a.may_be_operated]
        if not agents:
            return
        agent = draw.choice(agents)
        what = draw.choice(("suspend", "close", "fork", "fork"))
        self._note(f"operator: {what} {agent.session_id}")
        if what == "fork":
            await fork(agent, self._agents, f"{agent.name}.op{draw.getrandbits(24)}")
            return
        agent.operated = True
        session_id, tenant = agent.session_id, agent.tenant

        async def act(app: Any) -> Any:
            if what == "suspend":
                ask = session_pb2.SuspendSessionRequest(session_id=session_id)
                return await app.sessions.suspend(tenant, ask)
            end = session_pb2.CloseSessionRequest(session_id=session_id)
            return await app.sessions.close(tenant, end)

        try:
            await self._world.network.unary(self._gateway(draw), act, OPERATOR_S)
        except SessileError as error:
            self._note(f"operator: {what} {session_id}: {error}")

    # -- inside -------------------------------------------------------------------------------

    async def _drain(self, draw: random.Random, victim: SimReplica, *, shutdown: bool) -> None:
        async def handler(app: Any, call: Call) -> None:
            async for progress in app.drains.drain(victim.name, DRAIN_S, shutdown):
                await call.put(progress)

        last: Any = None
        try:
            steps = self._world.network.stream(self._gateway(draw), handler, 2 * DRAIN_S)
            async for step in steps:
                last = step
        except SessileError as error:
            self._note(f"drain {victim.name}: {error}")
        if last is not None and last.moved_with_kv:
            self._saw(Row.DRAIN_MOVES_IDLE)

    async def _undrain(self, replica: SimReplica) -> None:
        if replica.ref is None or not self._world.server.is_draining(replica.ref):
            return
        client = SimReplicaClient(self._world.network, replica.endpoint)
        try:
            await client.set_draining(replica_pb2.SetDrainingRequest(draining=False), OPERATOR_S)
        except SessileError as error:
            self._note(f"undo the drain of {replica.name}: {error}")

    def _some_calls(self, draw: random.Random) -> list[Call]:
        calls = self._world.network.streams()
        return draw.sample(calls, min(len(calls), draw.randrange(1, 4)))

    def _live(self) -> list[SimReplica | SimGateway]:
        return [*self._world.live_replicas(), *self._world.live_gateways()]

    def _names(self) -> list[str]:
        return [*sorted(self._world.replicas), *sorted(self._world.gateways)]

    def _replica(self, draw: random.Random) -> SimReplica | None:
        """One that may be harmed: at least one other stays."""
        live = self._world.live_replicas()
        return draw.choice(live) if len(live) > 1 else None

    async def _replace(self, victim: SimReplica) -> None:
        """As a supervisor does: again and again, if the new one refuses its store."""
        while self._world.replicas[victim.name] is victim:
            await self._world.start_replica(victim.name)
            victim = self._world.replicas[victim.name]
            if not victim.ended:
                return
            await anyio.sleep(RESTART_S)

    def _gateway(self, draw: random.Random) -> str:
        return draw.choice(sorted(self._world.gateways))

    async def _pause(self, draw: random.Random, least_s: float, most_s: float) -> None:
        await anyio.sleep(draw.uniform(least_s, most_s))

    def _saw(self, row: Row) -> None:
        self._world.coverage[row] += 1

    def _note(self, what: str) -> None:
        self.log.append(f"{anyio.current_time():8.3f} {what}")
        self._world.timeline.note("", f"fault: {what}")


FAULTS: dict[str, Callable[[Storm, random.Random], Coroutine[Any, Any, None]]] = {
    "kill_replica": Storm.kill_replica,
    "stop_replica": Storm.stop_replica,
    "freeze_replica": Storm.freeze_replica,
    "kill_gateway": Storm.kill_gateway,
    "flaky_store": Storm.flaky_store,
    "store_outage": Storm.store_outage,
    "cut": Storm.cut,
    "drain": Storm.drain,
    "migrate": Storm.migrate,
    "corrupt_pages": Storm.corrupt_pages,
    "reset_streams": Storm.reset_streams,
    "half_open": Storm.half_open,
    "cut_one_way": Storm.cut_one_way,
    "cut_from_store": Storm.cut_from_store,
    "duplicates": Storm.duplicates,
    "slow_network": Storm.slow_network,
    "store_restart": Storm.store_restart,
    "skew_clocks": Storm.skew_clocks,
    "jump_clock": Storm.jump_clock,
    "slow_engine": Storm.slow_engine,
    "evict": Storm.evict,
    "burst": Storm.burst,
    "drain_and_undo": Storm.drain_and_undo,
    "poison": Storm.poison,
    "evicting_store": Storm.evicting_store,
    "cancel_at_switch": Storm.cancel_at_switch,
    "late_switch": Storm.late_switch,
    "operate": Storm.operate,
    "lose_writes": Storm.lose_writes,
    "lose_writes_and_owner": Storm.lose_writes_and_owner,
    "lose_a_move": Storm.lose_a_move,
    "lose_a_turn": Storm.lose_a_turn,
}
LOSSY = frozenset({"lose_writes", "lose_writes_and_owner", "lose_a_move", "lose_a_turn"})
"""Clients may be told of a loss then."""
LOSSY_SHARE = 0.15
"""Of the histories."""
