"""What the commands of a scenario work on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup

from gateway.core.machines import ReplicaState
from loadtest.simulation.loop import current_process
from loadtest.simulation.redis import Fault
from loadtest.simulation.scenario.script import Command
from loadtest.simulation.scenario.transcript import Transcript
from loadtest.simulation.scenario.watch import Watch
from loadtest.simulation.world import SimGateway, SimReplica, World
from statestore.executor import ScriptCall

CALL_S = 120.0
PATIENCE_S = 60.0
"""Virtual seconds that ``until`` waits at most."""
SERVING = (ReplicaState.READY, ReplicaState.DRAINING)


@dataclass
class Loss:
    """One call that gets no answer."""

    fault: Fault
    script: str


class Stage:
    """The world of a script, what is seen of it, and what is to go wrong in it."""

    def __init__(self, built: World, tasks: TaskGroup, watch: Watch) -> None:
        self.world = built
        self.tasks = tasks
        self.watch = watch
        self.seen = Transcript()
        self.losses: list[Loss] = []
        """Calls to come that get no answer."""
        self.storeless: set[str] = set()
        """Processes that do not reach the store."""
        self.background = 0
        """Commands that are not done yet."""
        built.server.watch = watch
        self._usual_fault, built.server.fault = built.server.fault, self._fault

    async def ask(self, c: Command, call: Callable[[Any], Awaitable[Any]]) -> Any:
        """One call of the command's gateway."""
        return await self.world.network.unary(self.via(c), call, CALL_S)

    def via(self, c: Command) -> str:
        """The gateway that the command names, or the first that lives."""
        return c.options.get("via") or self.world.live_gateways()[0].name

    def node(self, c: Command) -> SimReplica | SimGateway:
        """The process that the command names."""
        (name,) = c.words
        return self.world.replicas.get(name) or self.world.gateways[name]

    def configure(self, setting: str, value: str) -> None:
        """Sets ``group.name`` for processes that are yet to start."""
        built, (group, name) = self.world, setting.split(".")
        if group == "engine":
            built.engine = replace(built.engine, **{name: int(value)})  # type: ignore[arg-type]
        elif group == "turn":
            built.turn_limits = replace(built.turn_limits, **{name: float(value)})  # type: ignore[arg-type]
        else:
            old = getattr(built.gateway_config, group)
            new = replace(old, **{name: type(getattr(old, name))(value)})
            built.gateway_config = replace(built.gateway_config, **{group: new})

    async def until_ready(self) -> None:
        """Every gateway sees every replica that runs, and none starting."""

        def ready() -> bool:
            alive = [replica.ref for replica in self.world.live_replicas()]
            return all(
                ref is not None and gateway.app.fleet.snapshot.state_of(ref) in SERVING
                for gateway in self.world.live_gateways()
                for ref in alive
            )

        await anyio.sleep(0.01)
        with anyio.fail_after(PATIENCE_S):
            while not ready():  # noqa: ASYNC110 - gateways tell nobody
                await anyio.sleep(0.05)
        for replica in self.world.live_replicas():
            self.seen.ref(replica.ref)

    async def until(self, reached: Callable[[], object], name: str) -> None:
        """Waits for something that is seen; tells of ``name`` if it does not come."""
        with anyio.move_on_after(PATIENCE_S) as scope:
            while not reached():
                await self.seen.changed.wait()
        if scope.cancelled_caught:
            self.seen.say(f"{name}: not within {PATIENCE_S:.0f} s")

    def _fault(self, call: ScriptCall) -> Fault:
        process = current_process()
        if process is not None and process.name in self.storeless:
            return Fault.REQUEST_LOST
        for loss in self.losses:
            if process is not None and loss.script == call.script.name:
                self.losses.remove(loss)
                return loss.fault
        return self._usual_fault(call)


CommandFunction = Callable[[Stage, Command], Coroutine[Any, Any, None]]
CommandTable = dict[str, CommandFunction]


def table_of(*functions: CommandFunction) -> CommandTable:
    """Verb -> function, which is named ``do_`` and the verb."""
    return {function.__name__.removeprefix("do_"): function for function in functions}
