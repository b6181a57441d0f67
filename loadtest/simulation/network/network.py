"""Who can call whom, and what becomes of the calls. Every choice is drawn."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from sessile.v1 import replica_pb2 as pb
from sessile.v1.types_pb2 import TurnStream

from gateway.app.ports import ReplicaLost
from gateway.core.errors import DeadlineExceeded, InternalError
from loadtest.simulation.loop import Process, current_process
from loadtest.simulation.network.call import KEEPALIVE_S, Call, Handler, Listener
from loadtest.simulation.network.data import DataChannel

MAX_LATE_S = 3.0
"""How much later than the first the second delivery of a call may be."""
STORE = "store"
"""The store's name in cuts and delays."""

Response = TypeVar("Response")


@dataclass
class Network:
    """Who listens where, and who cannot hear whom. Every choice is drawn from ``draw``."""

    draw: random.Random
    min_delay_s: float = 0.000_1
    max_delay_s: float = 0.002
    window: int = 16
    """Messages of one stream on their way; then the sender waits."""
    corrupt_page_rate: float = 0.0
    """Share of KV pages that arrive with a wrong byte."""
    duplicate_rate: float = 0.0
    """Share of repeatable calls that are delivered a second time."""
    slowness_s: dict[str, float] = field(default_factory=dict)
    """By process (or STORE): how much longer its messages may take."""
    failures: list[BaseException] = field(default_factory=list)
    """Exceptions of handlers that no API knows: bugs."""
    on_dispatch: Callable[[pb.DispatchTurnRequest, str], None] | None = None
    """Told of each dispatch of a turn, and the endpoint."""
    on_stream: Callable[[pb.DispatchTurnRequest, TurnStream], None] | None = None
    """Told of each message that a replica sends for a dispatch, when it is sent."""
    on_page: Callable[[Process | None, Process, Any, Any, int], None] | None = None
    """Told of each page that a replica reads of another: both processes, the export, the target's
    reservation and the page's index in both."""
    on_reset: Callable[[Process], None] | None = None
    """Told of each process whose connections are reset while it lives."""
    duplicates: int = 0
    _listeners: dict[str, Listener] = field(default_factory=dict)
    _calls: dict[Call, None] = field(default_factory=dict)
    _dead: set[Process] = field(default_factory=set)
    _cuts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pairs of names, from sender to receiver, and how many faults cut them."""
    _healed: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self.data = DataChannel(self)

    def listen(self, listener: Listener) -> None:
        """From now on the listener can be called."""
        self._listeners[listener.endpoint] = listener

    def hang_up(self, process: Process, *, killed: bool) -> None:
        """The process is gone: connections to it are refused from now on. What one that was not
        killed has sent still arrives."""
        self._dead.add(process)
        for endpoint in [e for e, at in self._listeners.items() if at.process is process]:
            del self._listeners[endpoint]
        for call in [c for c in self._calls if c.listener.process is process]:
            if killed:
                call.reset()
            else:
                call.end(ReplicaLost("the server is stopping", refused=False))
        for call in [c for c in self._calls if c.client is process]:
            call.leave()
        self.data.hang_up(process)

    def cut(self, one: str, other: str) -> None:
        """From now on the two processes of these names do not hear each other."""
        self.cut_one_way(one, other)
        self.cut_one_way(other, one)

    def cut_one_way(self, sender: str, receiver: str) -> None:
        """From now on nothing from one process reaches the other."""
        self._cuts[sender, receiver] += 1

    def join(self, sender: str, receiver: str) -> None:
        """Ends one cut of this direction; what was sent meanwhile arrives."""
        if self._cuts[sender, receiver] > 0:
            self._cuts[sender, receiver] -= 1
        self._tell_healed()

    def heal(self) -> None:
        """Ends every cut, and what else is wrong with the network."""
        self._cuts.clear()
        self.slowness_s.clear()
        self.corrupt_page_rate = self.duplicate_rate = 0.0
        self._tell_healed()

    @property
    def fair(self) -> bool:
        """Everybody hears everybody, without delay."""
        return not (+self._cuts or self.slowness_s)

    def is_gone(self, process: Process) -> bool:
        """Whether it has hung up, for good."""
        return process in self._dead

    def is_cut(self, sender: str, receiver: str) -> bool:
        return self._cuts[sender, receiver] > 0

    def streams(self) -> list[Call]:
        """Calls under way, oldest first."""
        return list(self._calls)

    def draw_delay(self, *names: str) -> float:
        """Seconds that one message between these processes takes."""
        delay = self.draw.uniform(self.min_delay_s, self.max_delay_s)
        for name in names:
            if name in self.slowness_s:
                delay += self.slowness_s[name] * self.draw.random() ** 3
        return delay

    async def reachable(self, sender: Process | None, receiver: Process | None) -> None:
        """Waits while nothing from the one reaches the other."""
        if sender is None or receiver is None:
            return
        while self.is_cut(sender.name, receiver.name):
            await self._healed.wait()

    def _tell_healed(self) -> None:
        self._healed.set()
        self._healed = anyio.Event()

    def forget(self, call: Call) -> None:
        self._calls.pop(call, None)

    # -- calls --------------------------------------------------------------------------------

    async def stream(
        self, endpoint: str, handler: Handler, timeout_s: float, *, repeatable: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Messages of one call. Raises what the handler raised, ReplicaLost, DeadlineExceeded.
        ``repeatable``: it may be delivered twice."""
        client = current_process()
        deadline = anyio.current_time() + timeout_s
        call: Call | None = None
        try:
            while True:
                message = None
                with anyio.move_on_at(deadline) as scope:
                    if call is None:
                        call = await self._open(client, endpoint, handler, repeatable)
                    message = await call.take()
                if scope.cancelled_caught:
                    raise DeadlineExceeded(f"no answer within {timeout_s} s")
                if message is None:
                    return
                yield message
        finally:
            if call is not None:
                call.leave()

    async def unary(
        self,
        endpoint: str,
        answer: Callable[[Any], Awaitable[Response]],
        timeout_s: float,
        *,
        repeatable: bool = False,
    ) -> Response:
        """One call with one answer."""

        async def handler(app: Any, call: Call) -> None:
            await call.put(await answer(app))

        messages = self.stream(endpoint, handler, timeout_s, repeatable=repeatable)
        try:
            async for message in messages:
                response: Response = message
                return response
        finally:
            await messages.aclose()
        raise InternalError("the call ended without an answer")

    async def _open(
        self, client: Process | None, endpoint: str, handler: Handler, repeatable: bool
    ) -> Call:
        to = self._listeners.get(endpoint)
        names = [p.name for p in (client, None if to is None else to.process) if p is not None]
        await anyio.sleep(self.draw_delay(*names))
        listener = self._listeners.get(endpoint)
        if listener is None:
            raise ReplicaLost("connection refused", refused=True)
        await self.reachable(client, listener.process)
        if self._listeners.get(endpoint) is not listener:
            raise ReplicaLost("connection refused", refused=True)
        call = Call(self, client, listener)
        self._calls[call] = None
        listener.process.run(listener.tasks.start_soon, call.serve, handler)
        if repeatable and self.duplicate_rate and self.draw.random() < self.duplicate_rate:
            late_s = self.draw.choice((0.0, self.draw.uniform(0.0, MAX_LATE_S)))
            again = Call(self, client, listener)
            self.duplicates += 1
            listener.process.run(listener.tasks.start_soon, self._again, again, handler, late_s)
        return call

    async def _again(self, call: Call, handler: Handler, late_s: float) -> None:
        """The same request once more, from a caller that has gone on."""
        await anyio.sleep(late_s)
        call.abandoned = True
        with anyio.move_on_after(KEEPALIVE_S):
            await call.serve(handler)
