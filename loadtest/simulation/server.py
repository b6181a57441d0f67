"""The store's server in a simulated world: behind its network, in its weather, and watched."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import anyio

from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.database import Value
from loadtest.simulation.loop import current_process, outside, true_time
from loadtest.simulation.network import STORE, Network
from loadtest.simulation.redis import Fault, FaultHook, LuaExecutor
from statestore import keys
from statestore.executor import Reply, ScriptCall
from statestore.ports import StoreError, StoreUnavailable
from statestore.records import ReplicaRef
from statestore.script_runner import script_call

REFUSED_S = 0.001
"""A server that is down refuses connections at once; one that is unreachable is silent."""


@dataclass
class StoreWeather:
    """How the store's network behaves; changed while a history runs."""

    request_lost: float = 0.0
    reply_lost: float = 0.0
    down: bool = False
    """Nobody gets an answer."""
    restarting: bool = False
    """Nobody gets a connection."""
    restarts: int = 0
    """A reply of before a restart does not arrive after it."""
    evicting: bool = False
    """It may drop keys: whoever starts now must not serve (P8)."""
    cancel_at_switch: bool = False
    """Whoever runs a turn cancels it just before it is handed over."""
    switch_late_s: float = 0.0
    """How much longer than others the requests take that end a move."""

    @property
    def fair(self) -> bool:
        """Nothing at all is wrong."""
        return self == StoreWeather(restarts=self.restarts)

    def clear_up(self) -> None:
        """Ends everything that is wrong."""
        for name, value in asdict(StoreWeather(restarts=self.restarts)).items():
            setattr(self, name, value)


class WatchedExecutor(LuaExecutor):
    """The store's server behind the simulated network, with a witness. Requests that are slower
    than their caller's patience are applied when they arrive, though nobody waits any more."""

    def __init__(
        self,
        time_us: Callable[[], int],
        fault: FaultHook,
        network: Network,
        weather: StoreWeather,
    ) -> None:
        super().__init__(time_us, fault=fault)
        self.watch: Witness | None = None
        self.network = network
        self.weather = weather
        self.on_turn: list[Callable[[str], None]] = []
        """Told, in its process, of each session in which a turn was begun or resumed."""

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        process = current_process()
        if process is None:
            return [self.run_now(call) for call in calls]
        if self.watch is not None:
            self.watch.issued(process, calls)
        there_s, back_s = (self.network.draw_delay(process.name, STORE) for _ in range(2))
        if there_s + back_s >= timeout_s:
            outside(asyncio.get_running_loop().call_later, there_s, self._arrive_late, calls)
            await anyio.sleep(timeout_s)
            return [StoreUnavailable("no answer in time") for _ in calls]
        await anyio.sleep(there_s)
        if self.weather.restarting:
            await anyio.sleep(REFUSED_S)
            return [StoreUnavailable("connection refused") for _ in calls]
        if self.weather.switch_late_s and any(c.script.name == "switch_migration" for c in calls):
            await anyio.sleep(self.weather.switch_late_s)
        if self.weather.cancel_at_switch:
            self._cancel_first(calls)
        replies, applied_s = [self._execute_one(call) for call in calls], true_time()
        connection = self.weather.restarts
        if any(isinstance(reply, StoreUnavailable) for reply in replies):
            await anyio.sleep(timeout_s)
            return replies
        await anyio.sleep(back_s)
        if connection != self.weather.restarts:
            return [StoreUnavailable("connection reset") for _ in calls]
        if self.watch is not None:
            self.watch.answered(process, calls, applied_s)
        return replies

    def _arrive_late(self, calls: Sequence[ScriptCall]) -> None:
        for call in calls:
            if not (self.weather.down or self.weather.restarting):
                self.run_now(call)

    def _cancel_first(self, calls: Sequence[ScriptCall]) -> None:
        """Clients cancel the turns that these calls are about to hand over."""
        for call in calls:
            if call.script.name == "switch_migration" and call.args[5]:
                self.run_now(script_call("cancel", [call.keys[0]], [call.args[5], 60_000, 64]))

    def is_draining(self, ref: ReplicaRef) -> bool:
        """As the store has it."""
        fleet = self.peek(keys.FLEET)
        name = ref.replica_id.encode()
        return (
            isinstance(fleet, dict)
            and fleet.get(b"inc:" + name) == b"%d" % ref.incarnation
            and fleet.get(b"draining:" + name) == b"1"
        )

    def run_now(self, call: ScriptCall) -> Reply:
        reply = super().run_now(call)
        if self.watch is not None:
            self.watch(call, reply)
        if call.script.name in ("begin", "resume") and _first(reply) in (b"begun", b"resumed"):
            for told in self.on_turn:
                told(call.keys[0].rpartition(":s:")[2])
        return reply

    def info(self) -> dict[str, str]:
        """What the server tells of itself."""
        policy = "allkeys-lru" if self.weather.evicting else "noeviction"
        return {"redis_version": "7.4.0", "maxmemory_policy": policy}

    def restore(self, snapshot: dict[bytes, Value]) -> None:
        super().restore(snapshot)
        if self.watch is not None:
            self.watch.forget()


def simulated_server(
    network: Network, weather: StoreWeather, draw: random.Random, time_us: Callable[[], int]
) -> WatchedExecutor:
    """An empty store. Which calls get lost is drawn, as the weather and the cuts are then."""

    def fault(call: ScriptCall) -> Fault:
        del call
        process = current_process()
        if process is None:
            return Fault.NONE
        if weather.down or network.is_cut(process.name, STORE):
            return Fault.REQUEST_LOST
        if network.is_cut(STORE, process.name):
            return Fault.REPLY_LOST
        chance = draw.random()
        if chance < weather.request_lost:
            return Fault.REQUEST_LOST
        return (
            Fault.REPLY_LOST if chance < weather.request_lost + weather.reply_lost else Fault.NONE
        )

    return WatchedExecutor(time_us, fault, network, weather)


def _first(reply: Reply) -> Reply:
    return reply[0] if isinstance(reply, list) and reply else reply
