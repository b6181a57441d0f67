"""The network between simulated processes: calls, streams and the KV data channel, with faults.

A handler runs in a task of the server's process, so a stopped server is silent and a killed one
resets its connections. Messages are serialised on the way, errors go through the production
mapping to gRPC status and back, and streams have a window, as on the wire.

Connections can be reset while both ends live, or be half open: then one side hears nothing more and
neither knows, until its keep-alive does. Cuts may be of one direction only. A call may be delivered
twice, the second time late: where a caller repeats what it got no answer to, that happens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
from anyio.abc import TaskGroup
from grpc import aio
from sessile.v1 import replica_pb2 as pb
from sessile.v1.types_pb2 import TurnStream

from gateway.app.ports import ReplicaLost
from gateway.core.errors import DeadlineExceeded, InternalError, SessileError
from gateway.rpc.replica_client import translate
from gateway.rpc.serving import store_failure
from gateway.rpc.status import DETAILS_KEY, code_of, to_status
from loadtest.simulation.loop import Process, current_process, outside, true_time
from statestore.ports import StoreError

STOPPED_POLL_S = 0.05
PAGE_S = 0.000_05
"""One KV page on the data channel."""
SLOW_PAGE = 0.05
"""Of a slow process's delay, how much one of its pages takes at most."""
KEEPALIVE_S = 4.0
"""Until an end of a connection notices that the other one is not there any more."""
MAX_LATE_S = 3.0
"""How much later than the first the second delivery of a call may be."""
SLEEP_STEP_S = 0.000_001
"""Least sleep: a clock that is not the true one may wake a sleeper a little early."""
STORE = "store"
"""The store's name in cuts and delays."""


class WireMessage(Protocol):
    """A protobuf message."""

    def SerializeToString(self) -> bytes: ...


Request = TypeVar("Request", bound=WireMessage)
Response = TypeVar("Response")
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
    _data: dict[str, KvPort] = field(default_factory=dict)
    _calls: dict[Call, None] = field(default_factory=dict)
    _pulling: dict[Any, tuple[Process | None, Process]] = field(default_factory=dict)
    """Exports that are being read -> by whom, and whose they are."""
    _dead: set[Process] = field(default_factory=set)
    _cuts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pairs of names, from sender to receiver, and how many faults cut them."""
    _healed: anyio.Event = field(default_factory=anyio.Event)

    def listen(self, listener: Listener) -> None:
        self._listeners[listener.endpoint] = listener

    def listen_data(self, port: KvPort) -> None:
        self._data[port.endpoint] = port

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
        for export, (target, source) in self._pulling.items():
            if target is process:
                source.run(export.release)

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

    # -- KV data channel ----------------------------------------------------------------------

    async def pull(
        self,
        endpoint: str,
        ticket: bytes,
        reservation: Any,
        pages: int,
        page_bytes: int,
        timeout_s: float,
    ) -> int:
        """A Puller (see workers/kv/transfer.py)."""
        with anyio.fail_after(timeout_s):
            return await self._pull(endpoint, ticket, reservation, pages, page_bytes)

    async def _pull(
        self, endpoint: str, ticket: bytes, reservation: Any, pages: int, page_bytes: int
    ) -> int:
        target = current_process()
        await anyio.sleep(self.draw_delay())
        port = self._data.get(endpoint)
        if port is None or port.process in self._dead:
            raise ConnectionRefusedError(f"nobody listens at {endpoint}")
        await self._answering(target, port.process)
        export = port.claim(ticket)
        if export is None:
            raise ConnectionResetError("the ticket was refused")
        self._pulling[export] = (target, port.process)
        try:
            for index in range(pages):
                slowest_s = max(self._slowness(target), self._slowness(port.process))
                await anyio.sleep(PAGE_S + SLOW_PAGE * slowest_s * self.draw.random())
                await self._answering(target, port.process)
                reservation.buffer(index)[:] = export.view(index)
                if self.on_page is not None:
                    self.on_page(target, port.process, export, reservation, index)
                if self.draw.random() < self.corrupt_page_rate:
                    reservation.arrived_wrong(index)
                    reservation.buffer(index)[self.draw.randrange(page_bytes)] ^= 0x10
        except BaseException:
            reservation.broken = True
            raise
        finally:
            del self._pulling[export]
            port.process.run(export.release)
        return pages * page_bytes

    def _slowness(self, process: Process | None) -> float:
        return 0.0 if process is None else self.slowness_s.get(process.name, 0.0)

    async def _answering(self, target: Process | None, source: Process) -> None:
        await self.reachable(target, source)
        await self.reachable(source, target)
        while source.stopped and source not in self._dead:  # noqa: ASYNC110 - no signal comes
            await anyio.sleep(STOPPED_POLL_S)
        if source in self._dead:
            raise ConnectionResetError("connection reset")


class KvPort:
    """One replica's end of the data channel: a TicketIssuer (see workers/kv/transfer.py)."""

    def __init__(self, endpoint: str, process: Process) -> None:
        self.endpoint = endpoint
        self.process = process
        self._exports: dict[bytes, Any] = {}
        self._issued = 0

    def issue_ticket(self, export: Any, lease_s: float) -> bytes:
        self._issued += 1
        ticket = self._issued.to_bytes(16, "big")
        self._exports[ticket] = export

        def expire() -> None:
            unused = self.claim(ticket)
            if unused is not None:
                unused.release()

        asyncio.get_running_loop().call_later(lease_s, expire)
        return ticket

    def claim(self, ticket: bytes) -> Any:
        """The export of an unused ticket, or None. The caller releases it."""
        return self._exports.pop(ticket, None)


class SimReplicaClient:
    """Implements ``gateway.app.ports.ReplicaClient`` and the workers' peer calls."""

    def __init__(self, network: Network, endpoint: str) -> None:
        self._network = network
        self._endpoint = endpoint

    async def dispatch_turn(
        self, request: pb.DispatchTurnRequest, timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        sent, network = request.SerializeToString(), self._network
        if network.on_dispatch is not None:
            network.on_dispatch(request, self._endpoint)

        async def handler(app: Any, call: Call) -> None:
            stream = app.dispatch_turn(pb.DispatchTurnRequest.FromString(sent))
            try:
                async for message in stream:
                    if network.on_stream is not None:
                        network.on_stream(request, message)
                    await call.put(message.SerializeToString())
            finally:
                await stream.aclose()

        messages = network.stream(self._endpoint, handler, timeout_s, repeatable=True)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()

    async def _call(self, name: str, request: Any, timeout_s: float) -> Any:
        kind, sent = type(request), request.SerializeToString()

        async def answer(app: Any) -> Any:
            response = await getattr(app, name)(kind.FromString(sent))
            return type(response).FromString(response.SerializeToString())

        return await self._network.unary(self._endpoint, answer, timeout_s, repeatable=True)

    async def stop_turn(self, request: pb.StopTurnRequest, timeout_s: float) -> Any:
        return await self._call("stop_turn", request, timeout_s)

    async def hand_over(self, request: pb.HandOverRequest, timeout_s: float) -> Any:
        return await self._call("hand_over", request, timeout_s)

    async def abort_hand_over(self, request: pb.AbortHandOverRequest, timeout_s: float) -> Any:
        return await self._call("abort_hand_over", request, timeout_s)

    async def import_session(self, request: pb.ImportSessionRequest, timeout_s: float) -> Any:
        return await self._call("import_session", request, timeout_s)

    async def release_session(self, request: pb.ReleaseSessionRequest, timeout_s: float) -> Any:
        return await self._call("release_session", request, timeout_s)

    async def read_turns(self, request: pb.ReadTurnsRequest, timeout_s: float) -> Any:
        return await self._call("read_turns", request, timeout_s)

    async def set_draining(self, request: pb.SetDrainingRequest, timeout_s: float) -> Any:
        return await self._call("set_draining", request, timeout_s)

    async def export_kv(self, request: pb.ExportKvRequest, timeout_s: float) -> Any:
        return await self._call("export_kv", request, timeout_s)


@dataclass(frozen=True)
class SimReplicaClients:
    """Implements ``gateway.app.ports.ReplicaClients`` and ``workers.kv.transfer.PeerClient``."""

    network: Network

    def at(self, endpoint: str) -> SimReplicaClient:
        return SimReplicaClient(self.network, endpoint)

    async def export_kv(
        self, endpoint: str, request: pb.ExportKvRequest, timeout_s: float
    ) -> pb.ExportKvResponse:
        response: pb.ExportKvResponse = await self.at(endpoint).export_kv(request, timeout_s)
        return response
