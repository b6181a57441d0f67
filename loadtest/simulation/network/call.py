"""One call between simulated processes, with what can happen to its connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup
from grpc import aio

from gateway.app.ports import ReplicaLost
from gateway.core.errors import InternalError, SessileError
from gateway.rpc.replica_client import translate
from gateway.rpc.serving import store_failure
from gateway.rpc.status import DETAILS_KEY, code_of, to_status
from loadtest.simulation.loop import Process, outside, true_time
from statestore.ports import StoreError

if TYPE_CHECKING:
    from loadtest.simulation.network.network import Network

KEEPALIVE_S = 4.0
"""Until an end of a connection notices that the other one is not there any more."""
SLEEP_STEP_S = 0.000_001
"""Least sleep: a clock that is not the true one may wake a sleeper a little early."""

Handler = Callable[[Any, "Call"], Awaitable[None]]
"""Serves one call: gets the listening application, and the call to answer into."""


def wire_error(error: SessileError) -> SessileError:
    """The error as the other side of a gRPC call sees it."""
    status = to_status(error)
    trailers = aio.Metadata((DETAILS_KEY, status.SerializeToString()))
    code = code_of(error)
    return translate(aio.AioRpcError(code, aio.Metadata(), trailers, status.message))


@dataclass(eq=False)
class Listener:
    """An application that can be called. ``tasks`` owns the handlers of its calls."""

    endpoint: str
    process: Process
    app: Any
    tasks: TaskGroup


class Call:
    """One call, unary or streaming: the server puts messages, the client takes them."""

    def __init__(self, network: Network, client: Process | None, listener: Listener) -> None:
        self.listener = listener
        self.client = client
        self.abandoned = False
        """Nobody will take what is put from now on."""
        self._network = network
        self._half_open = False
        self._items: deque[tuple[float, Any]] = deque()
        self._last_arrival = 0.0
        self._error: SessileError | None = None
        self._ended = False
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()

    async def put(self, message: Any) -> None:
        """Server side: sends a message; waits while the window is full."""
        while len(self._items) >= self._network.window and not (self._ended or self.abandoned):
            await self._wait()
        if self.abandoned:
            return
        arrival = true_time() + self._network.draw_delay(self._name(), self.listener.process.name)
        self._last_arrival = max(self._last_arrival, arrival)
        self._items.append((self._last_arrival, message))
        self._notify()

    async def take(self) -> Any:
        """Client side: the next message, or None at the end. Raises the call's error."""
        while True:
            await self._network.reachable(self.listener.process, self.client)
            if self._half_open:
                await self._wait()
            elif self._items:
                arrival, message = self._items[0]
                if arrival <= true_time():
                    self._items.popleft()
                    self._notify()
                    return message
                await anyio.sleep(max(arrival - true_time(), SLEEP_STEP_S))
            elif self._ended:
                if self._error is not None:
                    raise self._error
                return None
            else:
                await self._wait()

    def end(self, error: SessileError | None) -> None:
        """The server answered for the last time."""
        if not self._ended:
            self._ended, self._error = True, error
            self._notify()

    def reset(self) -> None:
        """The server's process was killed: what is still on its way is lost."""
        now = true_time()
        arrived = deque(item for item in self._items if item[0] <= now)
        if len(arrived) < len(self._items):
            self._items, self._ended = arrived, False
        self.end(ReplicaLost("connection reset", refused=True))

    def break_off(self) -> None:
        """The connection is reset though both ends live; what was on its way is lost."""
        self.abandoned = True
        self.reset()
        self._network.forget(self)
        if self._network.on_reset is not None:
            self._network.on_reset(self.listener.process)
        self.listener.process.run(self._scope.cancel)

    def go_silent(self) -> None:
        """From now on the client hears nothing, until the keep-alives of both ends fail."""
        self._half_open = True

        def notice() -> None:
            self._half_open, self.abandoned = False, True
            self._items.clear()
            # Also if the server has ended it: the client has not heard of that.
            self._ended = True
            self._error = ReplicaLost("keepalive watchdog timeout", refused=False)
            self._notify()
            self._network.forget(self)
            self.listener.process.run(self._scope.cancel)

        outside(asyncio.get_running_loop().call_later, KEEPALIVE_S, notice)

    def leave(self) -> None:
        """The client is not interested any more: the handler is cancelled, once its process hears
        of it."""
        self._network.forget(self)
        self._ended = True
        self._notify()
        process = self.listener.process
        if self._half_open or self._network.is_cut(self._name(), process.name):

            def notice() -> None:
                process.run(self._scope.cancel)

            outside(asyncio.get_running_loop().call_later, KEEPALIVE_S, notice)
        else:
            process.run(self._scope.cancel)

    async def serve(self, handler: Handler) -> None:
        """Runs the handler, in a task of the server."""
        with self._scope:
            try:
                await handler(self.listener.app, self)
            except Exception as error:  # noqa: BLE001 - as the server's handlers do
                self.end(self._failure(error))
            else:
                self.end(None)

    def _failure(self, error: Exception) -> SessileError:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, StoreError):
            error = store_failure(error)
        if not isinstance(error, SessileError):
            self._network.failures.append(error)
            error = InternalError(f"unexpected {type(error).__name__}")
        return wire_error(error)

    def _name(self) -> str:
        return "" if self.client is None else self.client.name

    async def _wait(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
