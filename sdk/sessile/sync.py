"""The same client for code without an event loop.

    from sessile.sync import Sessile

    with Sessile("localhost:8470") as client:
        session = client.open(system="You are brief.")
        for event in session.run("What is 6 * 7?"):
            ...

Each client has one background thread with an event loop of its own; every call is handed to it and
waited for. An interrupted wait (Ctrl-C) cancels the call, which for a turn means what its
``on_abandon`` says. Handles may be shared between threads, one turn's stream may not.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from sessile import client as aio_client
from sessile import fleet as aio_fleet
from sessile import session as aio_session
from sessile import tool_run as aio_tool_run
from sessile import turn as aio_turn
from sessile.credentials import Tls, Token
from sessile.events import TurnEvent
from sessile.messages import Input, Message, Priority, Sampling, Tool
from sessile.records import (
    Position,
    SessionInfo,
    SessionState,
    TranscriptTurn,
    TurnResult,
    TurnStatus,
)
from sessile.tool_run import OnToolError, ToolRunEvent, ToolRunResult
from sessile.transport import RetryPolicy, Runtime
from sessile.turn import OnAbandon

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

T = TypeVar("T")
Face = TypeVar("Face", bound=type)

__all__ = ["Fleet", "Sessile", "Session", "ToolRun", "Turn"]


def _documented_by(model: type) -> Callable[[Face], Face]:
    """Members without a docstring of their own have that of the async class's member."""

    def document(face: Face) -> Face:
        for name, member in list(vars(face).items()):
            text = getattr(getattr(model, name, None), "__doc__", None)
            if name.startswith("_") or member.__doc__ or not text:
                continue
            if isinstance(member, property):
                setattr(face, name, property(member.fget, doc=text))
            else:
                member.__doc__ = text
        return face

    return document


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sessile", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            self._stop = asyncio.Event()
            runner.run(self._stop.wait())

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there; an exception here (KeyboardInterrupt) cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        async def step() -> tuple[T] | None:
            try:
                return (await anext(source),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self.call(step())) is not None:
                yield item[0]
        finally:
            self.call(source.aclose())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._stop.set())
        self._thread.join()


@_documented_by(aio_turn.Turn)
class Turn:
    """A turn being read: an iterator of events; see :class:`sessile.Turn`."""

    def __init__(self, loop: _LoopThread, turn: aio_turn.Turn) -> None:
        self._loop = loop
        self._turn = turn

    @property
    def turn_id(self) -> str:
        return self._turn.turn_id

    @property
    def position(self) -> Position | None:
        return self._turn.position

    @property
    def text(self) -> str:
        return self._turn.text

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TurnEvent:
        event = self._loop.call(self._step())
        if event is None:
            raise StopIteration
        return event

    async def _step(self) -> TurnEvent | None:
        try:
            return await anext(self._turn)
        except StopAsyncIteration:
            return None

    def result(self) -> TurnResult:
        return self._loop.call(self._turn.result())

    def text_stream(self) -> Iterator[str]:
        return self._loop.iterate(self._turn.text_stream())

    def cancel(self) -> TurnStatus:
        return self._loop.call(self._turn.cancel())

    def close(self) -> None:
        """Stops reading; see ``aclose`` of :class:`sessile.Turn`."""
        self._loop.call(self._turn.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@_documented_by(aio_tool_run.ToolRun)
class ToolRun:
    """A run with tools being read: an iterator of events; see :class:`sessile.ToolRun`. Async
    functions run on the client's own loop, others in threads."""

    def __init__(self, loop: _LoopThread, run: aio_tool_run.ToolRun) -> None:
        self._loop = loop
        self._run = run

    @property
    def run_id(self) -> str:
        return self._run.run_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ToolRunEvent:
        event = self._loop.call(self._step())
        if event is None:
            raise StopIteration
        return event

    async def _step(self) -> ToolRunEvent | None:
        try:
            return await anext(self._run)
        except StopAsyncIteration:
            return None

    def result(self) -> ToolRunResult:
        return self._loop.call(self._run.result())

    def close(self) -> None:
        """Stops; see ``aclose`` of :class:`sessile.ToolRun`."""
        self._loop.call(self._run.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@_documented_by(aio_session.Session)
class Session:
    """A session's handle; see :class:`sessile.Session`."""

    def __init__(self, loop: _LoopThread, session: aio_session.Session) -> None:
        self._loop = loop
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def session_id(self) -> str:
        """Names the session: ``client.session(session_id)`` is another handle to it."""
        return self._session.session_id

    @property
    def info(self) -> SessionInfo | None:
        return self._session.info

    @property
    def head(self) -> Position | None:
        return self._session.head

    def with_options(
        self, *, timeout_s: float | None = None, retry: RetryPolicy | None = None
    ) -> Session:
        return Session(self._loop, self._session.with_options(timeout_s=timeout_s, retry=retry))

    def run(
        self,
        messages: Input,
        *,
        turn_id: str | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
        on_abandon: OnAbandon = "cancel",
        check_head: bool = True,
        **sampling: Unpack[Sampling],
    ) -> Turn:
        turn = self._session.run(
            messages,
            turn_id=turn_id,
            timeout_s=timeout_s,
            priority=priority,
            on_abandon=on_abandon,
            check_head=check_head,
            **sampling,
        )
        return Turn(self._loop, turn)

    def run_tools(
        self,
        messages: Input,
        *,
        tools: Sequence[Tool] | None = None,
        run_id: str | None = None,
        max_rounds: int = 10,
        max_parallel: int = 8,
        tool_timeout_s: float | None = 60.0,
        on_tool_error: OnToolError = "tell",
        timeout_s: float | None = None,
        priority: Priority | None = None,
        on_abandon: OnAbandon = "cancel",
        check_head: bool = True,
        **sampling: Unpack[Sampling],
    ) -> ToolRun:
        run = self._session.run_tools(
            messages,
            tools=tools,
            run_id=run_id,
            max_rounds=max_rounds,
            max_parallel=max_parallel,
            tool_timeout_s=tool_timeout_s,
            on_tool_error=on_tool_error,
            timeout_s=timeout_s,
            priority=priority,
            on_abandon=on_abandon,
            check_head=check_head,
            **sampling,
        )
        return ToolRun(self._loop, run)

    def attach(
        self,
        turn_id: str,
        *,
        resume_from: Position | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
        on_abandon: OnAbandon = "detach",
    ) -> Turn:
        turn = self._session.attach(
            turn_id,
            resume_from=resume_from,
            timeout_s=timeout_s,
            priority=priority,
            on_abandon=on_abandon,
        )
        return Turn(self._loop, turn)

    def cancel(self, turn_id: str) -> TurnStatus:
        return self._loop.call(self._session.cancel(turn_id))

    def refresh(self) -> SessionInfo:
        return self._loop.call(self._session.refresh())

    def fork(
        self,
        *,
        at_turn: int | None = None,
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Session:
        fork = self._session.fork(at_turn=at_turn, labels=labels, request_id=request_id)
        return Session(self._loop, self._loop.call(fork))

    def suspend(self) -> SessionInfo:
        return self._loop.call(self._session.suspend())

    def resume(self) -> SessionInfo:
        return self._loop.call(self._session.resume())

    def close(self, *, retention_s: float | None = None, purge: bool = False) -> None:
        self._loop.call(self._session.close(retention_s=retention_s, purge=purge))

    def transcript(self, *, from_turn: int = 0, token_ids: bool = False) -> list[TranscriptTurn]:
        return self._loop.call(self._session.transcript(from_turn=from_turn, token_ids=token_ids))

    def watch(self) -> Iterator[SessionInfo]:
        return self._loop.iterate(self._session.watch())


@_documented_by(aio_fleet.Fleet)
class Fleet:
    """The operator's calls; see :class:`sessile.Fleet`."""

    def __init__(self, loop: _LoopThread, fleet: aio_fleet.Fleet) -> None:
        self._loop = loop
        self._fleet = fleet

    def replicas(self, *, include_down: bool = False) -> list[aio_fleet.Replica]:
        return self._loop.call(self._fleet.replicas(include_down=include_down))

    def watch(self, *, interval_s: float = 0.5) -> Iterator[list[aio_fleet.Replica]]:
        return self._loop.iterate(self._fleet.watch(interval_s=interval_s))

    def drain(
        self, replica_id: str, *, timeout_s: float = 120.0, shutdown: bool = False
    ) -> Iterator[aio_fleet.DrainProgress]:
        return self._loop.iterate(
            self._fleet.drain(replica_id, timeout_s=timeout_s, shutdown=shutdown)
        )

    def undrain(self, replica_id: str) -> aio_fleet.DrainProgress:
        return self._loop.call(self._fleet.undrain(replica_id))

    def migrate(
        self,
        session_id: str,
        *,
        target: str = "",
        timeout_s: float = 30.0,
        allow_recompute: bool = False,
    ) -> aio_fleet.Migration:
        move = self._fleet.migrate(
            session_id, target=target, timeout_s=timeout_s, allow_recompute=allow_recompute
        )
        return self._loop.call(move)


@_documented_by(aio_client.Sessile)
class Sessile:
    """The client; see :class:`sessile.Sessile`. Use it as ``with``."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        tenant: str | None = None,
        api_key: str | None = None,
        token: Token | None = None,
        tls: Tls | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        priority: Priority = Priority.INTERACTIVE,
        runtime: Runtime | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self._client = aio_client.Sessile(
            target,
            tenant=tenant,
            api_key=api_key,
            token=token,
            tls=tls,
            credentials=credentials,
            metadata=metadata,
            timeout_s=timeout_s,
            retry=retry,
            priority=priority,
            runtime=runtime,
            tracer_provider=tracer_provider,
        )
        self._thread: _LoopThread | None = None

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("the client is open already")
        thread = _LoopThread()
        try:
            thread.call(self._client.__aenter__())
        except BaseException:
            thread.close()
            raise
        self._thread = thread
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop, self._thread = self._loop, None
        try:
            loop.call(self._client.__aexit__(exc_type, exc, traceback))
        finally:
            loop.close()

    def with_options(
        self, *, timeout_s: float | None = None, retry: RetryPolicy | None = None
    ) -> Self:
        view = copy.copy(self)
        view._client = self._client.with_options(timeout_s=timeout_s, retry=retry)
        return view

    @property
    def fleet(self) -> Fleet:
        return Fleet(self._loop, self._client.fleet)

    def open(
        self,
        *,
        model: str = "",
        system: str = "",
        messages: Sequence[Message] = (),
        tools: Sequence[Tool] = (),
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> Session:
        opening = self._client.open(
            model=model,
            system=system,
            messages=messages,
            tools=tools,
            labels=labels,
            request_id=request_id,
            **sampling,
        )
        return Session(self._loop, self._loop.call(opening))

    def session(self, session_id: str) -> Session:
        return Session(self._loop, self._client.session(session_id))

    def list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        states: Sequence[SessionState] = (),
        limit: int | None = None,
    ) -> Iterator[SessionInfo]:
        return self._loop.iterate(self._client.list(labels=labels, states=states, limit=limit))

    @property
    def _loop(self) -> _LoopThread:
        if self._thread is None:
            raise RuntimeError("use the client inside `with`")
        return self._thread
