"""The loop of an agent with tools: the model asks, the functions are called, their results are the
next turn's input, until the model answers without asking.

async with session.run_tools("What is the weather in Rome?", tools=[weather]) as run:
    async for event in run:
        match event:
            case Tokens(text=text) | Finished(text=text): print(text, end="")
            case ToolStarted(call=call): print(f"[{call.name}({call.arguments_json})]")

Round n is the turn ``{run_id}.{n}``. A run repeated under its ``run_id``, by whatever process,
reads the rounds that the session has and goes on after them. The functions of a round are called
again only if its results did not reach the session: what must not happen twice takes
:func:`current_call` as its own idempotency key.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from sessile import errors
from sessile.events import Accepted, TurnEvent
from sessile.messages import Input, Message, ToolCall
from sessile.records import TurnResult, TurnStatus
from sessile.tools import FunctionTool
from sessile.transport import CLEANUP_S
from sessile.turn import Turn

if TYPE_CHECKING:
    from sessile.tracing import Tracing

OnToolError = Literal["tell", "raise"]
"""What becomes of a tool that is unknown, is given wrong arguments, raises or takes too long: the
model is told as the call's result, or the run raises ToolFailed."""

MAX_RESULT_CHARS = 1 << 20
"""Of one tool's result. A longer one is an error of the tool: cutting it would make it a lie."""

_current: ContextVar[ToolCall] = ContextVar("sessile_tool_call")


def current_call() -> ToolCall:
    """The call that the running tool answers; its ``id`` stays the same if the call is repeated.
    Raises LookupError outside of a tool."""
    return _current.get()


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A tool is being called."""

    call: ToolCall
    round: int
    """From 0."""


@dataclass(frozen=True, slots=True)
class ToolEnded:
    """A tool's call ended."""

    call: ToolCall
    round: int
    output: str
    """What the model is told."""
    error: str
    """Why it failed; empty if it did not."""
    duration_ms: float


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A turn of the run ended; its tools, if it asks for some, are called next."""

    round: int
    result: TurnResult


ToolRunEvent = TurnEvent | ToolStarted | ToolEnded | RoundEnded
"""Events of a run: those of its turns, one turn after the other, and of its tools."""


@dataclass(frozen=True, slots=True)
class ToolRunResult:
    """A whole run."""

    run_id: str
    turns: tuple[TurnResult, ...]
    """One a round, in order."""
    calls: tuple[ToolEnded, ...]
    """The calls made by this process, by round, each round's in the order asked for."""

    @property
    def text(self) -> str:
        """The last turn's: the answer."""
        return self.turns[-1].text

    @property
    def status(self) -> TurnStatus:
        """The last turn's: COMMITTED, or CANCELLED if somebody cancelled it."""
        return self.turns[-1].status


@dataclass(frozen=True, slots=True)
class ToolRunOptions:
    """How a run calls its tools."""

    run_id: str
    max_rounds: int
    max_parallel: int
    tool_timeout_s: float | None
    on_tool_error: OnToolError

    def __post_init__(self) -> None:
        if self.max_rounds < 1 or self.max_parallel < 1:
            raise _invalid("max_rounds and max_parallel must be at least 1.")
        if self.tool_timeout_s is not None and self.tool_timeout_s <= 0:
            raise _invalid("tool_timeout_s must be positive, or None for no limit.")
        if self.on_tool_error not in ("tell", "raise"):
            raise _invalid('on_tool_error is "tell" or "raise".')


def _invalid(message: str) -> errors.InvalidRequest:
    hint = "Correct the arguments of run_tools."
    return errors.InvalidRequest(message, reason="INVALID_REQUEST", hint=hint)


class ToolRun:
    """A run being read: an async iterator of events, or :meth:`result` for all of it at once.

    Nothing happens before the first event is asked for. A cancelled reader, :meth:`aclose` and an
    ``async with`` block left early cancel the tools that run, and do to the turn what
    ``on_abandon`` says. A function that runs in a thread cannot be cancelled: it ends by itself
    and its result is dropped. Not for concurrent use.
    """

    def __init__(
        self,
        begin: Callable[[str, Input], Turn],
        attach: Callable[[str], Turn],
        messages: Input,
        tools: Mapping[str, FunctionTool],
        options: ToolRunOptions,
        tracing: Tracing,
        session_id: str,
    ) -> None:
        self._begin = begin
        self._attach = attach
        self._input = messages
        self._tools = tools
        self._options = options
        self._tracing = tracing
        self._session_id = session_id
        self._parallel = asyncio.Semaphore(options.max_parallel)
        self._events: deque[ToolRunEvent] = deque()
        self._round = 0
        self._turn: Turn | None = None
        self._attached = False
        """The round's turn existed before this run: the next one may too."""
        # Tasks of this run alone: aclose() ends and awaits them, as does the end of each round.
        self._calling: list[asyncio.Task[ToolEnded]] = []
        self._changed = asyncio.Event()
        self._turns: list[TurnResult] = []
        self._calls: list[ToolEnded] = []
        self._closed = False
        self._ended = False
        self._failure: errors.SessileError | None = None
        """Raised once the events before it are read."""

    @property
    def run_id(self) -> str:
        """Of all its turns: ``{run_id}.{round}``."""
        return self._options.run_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ToolRunEvent:
        """The next event. Raises SessileError (ToolRoundsExceeded, ToolFailed, TurnFailed, and what
        a turn raises)."""
        try:
            while not self._events:
                if self._failure is not None and not self._closed:
                    raise self._failure
                if self._closed or self._ended:
                    raise StopAsyncIteration
                await self._advance()
        except (asyncio.CancelledError, errors.SessileError):
            await self.aclose()
            raise
        return self._events.popleft()

    async def result(self) -> ToolRunResult:
        """Reads to the end; raises as the iterator does, and WrongState if it was abandoned."""
        async for _ in self:
            pass
        if not self._ended:
            raise errors.WrongState(
                "the run was abandoned before its end", hint="Run it again with its run_id."
            )
        return self._result()

    async def aclose(self) -> None:
        """Stops: cancels the tools, lets go of the turn. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._events.clear()
        for task in self._calling:
            task.cancel()
        if self._turn is not None:
            await self._turn.aclose()
        if self._calling:
            done, _ = await asyncio.wait(self._calling, timeout=CLEANUP_S)
            for task in done:
                if not task.cancelled():
                    task.exception()  # the first one was raised

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # -- turns --------------------------------------------------------------------------------

    async def _advance(self) -> None:
        """One step: an event of the turn, a change among the tools, or the next turn."""
        if self._calling:
            await self._await_tools()
        elif self._turn is None:
            self._turn = self._begin(f"{self.run_id}.{self._round}", self._input)
        else:
            await self._read(self._turn)

    async def _read(self, turn: Turn) -> None:
        try:
            event = await anext(turn)
        except StopAsyncIteration:
            await self._turn_ended(await turn.result())
            return
        if isinstance(event, Accepted):
            self._attached = event.attached
        self._events.append(event)

    async def _turn_ended(self, result: TurnResult) -> None:
        self._turn = None
        self._turns.append(result)
        self._events.append(RoundEnded(self._round, result))
        if result.status is not TurnStatus.COMMITTED or not result.tool_calls:
            self._ended = True
        elif self._round + 1 >= self._options.max_rounds:
            self._failure = errors.ToolRoundsExceeded(
                f"the model asks for tools in each of {self._options.max_rounds} rounds.",
                self._result(),
            )
        elif not (self._attached and await self._next_exists()):
            self._call(result.tool_calls)

    async def _next_exists(self) -> bool:
        """Goes on with the next round's turn if an earlier run got so far: its input is there."""
        turn = self._attach(f"{self.run_id}.{self._round + 1}")
        try:
            event = await anext(turn)
        except errors.NotFound:
            return False
        self._events.append(event)
        self._round += 1
        self._turn = turn
        return True

    def _result(self) -> ToolRunResult:
        return ToolRunResult(self.run_id, tuple(self._turns), tuple(self._calls))

    # -- tools --------------------------------------------------------------------------------

    def _call(self, calls: Sequence[ToolCall]) -> None:
        self._calling = [asyncio.create_task(self._answer(call)) for call in calls]

    async def _await_tools(self) -> None:
        """Returns after a change; goes on to the next round when all have ended."""
        pending = [task for task in self._calling if not task.done()]
        failed = [task for task in self._calling if task.done() and task.exception()]
        if failed:
            raise failed[0].exception() or AssertionError
        if pending:
            await self._changed.wait()
            self._changed.clear()
            return
        ended = [task.result() for task in self._calling]
        self._calling = []
        self._calls += ended
        self._input = [Message.tool(one.call, one.output) for one in ended]
        self._round += 1

    async def _answer(self, call: ToolCall) -> ToolEnded:
        try:
            async with self._parallel:
                self._events.append(ToolStarted(call, self._round))
                self._changed.set()
                began = time.perf_counter()
                output, error = await self._invoke(call)
                duration_ms = (time.perf_counter() - began) * 1000
                ended = ToolEnded(call, self._round, output, error, duration_ms)
                self._events.append(ended)
                return ended
        finally:
            # Its waker must find it done, which it is only after this last step.
            asyncio.get_running_loop().call_soon(self._changed.set)

    async def _invoke(self, call: ToolCall) -> tuple[str, str]:
        """The output and the error of one call, both texts. Whatever a tool raises is an answer to
        the model, or the end of the run: the except is broad."""
        _current.set(call)
        try:
            with self._tracing.tool(self._session_id, call.name, call.id):
                async with asyncio.timeout(self._options.tool_timeout_s) as limit:
                    output = await self._output(call)
        except (Exception, asyncio.CancelledError) as cause:
            task = asyncio.current_task()
            if isinstance(cause, asyncio.CancelledError) and task and task.cancelling():
                raise  # the run's own end, not a tool that cancelled itself
            late = isinstance(cause, TimeoutError) and limit.expired()
            error = (
                f"{call.name} took longer than {self._options.tool_timeout_s:g} s"
                if late
                else str(cause) or type(cause).__name__
            )
            if not late and not isinstance(cause, ValueError | LookupError):
                error = f"{type(cause).__name__}: {error}"
            if self._options.on_tool_error == "raise":
                raise errors.ToolFailed(
                    f"the tool {call.name} failed: {error}.", reason="TOOL_FAILED"
                ) from cause
            return json.dumps({"error": error}, ensure_ascii=False), error
        return output, ""

    async def _output(self, call: ToolCall) -> str:
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(sorted(self._tools)) or "none"
            raise ValueError(f"there is no tool {call.name!r}; there are: {known}")
        output = await tool.invoke(call.arguments)
        if len(output) > MAX_RESULT_CHARS:
            raise ValueError(
                f"the result has {len(output)} characters, {MAX_RESULT_CHARS} at most; ask for less"
            )
        return output
