"""A session: a conversation that the server keeps, with its KV cache, between turns.

session = await client.open(system="You are brief.")
result = await session.run("What is 6 * 7?", max_tokens=16).result()
fork = await session.fork()
await session.close()
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Unpack

from sessile.errors import InvalidRequest
from sessile.events import Accepted, Finished
from sessile.messages import Input, Priority, Sampling, Tool, messages_to_pb, sampling_to_pb
from sessile.records import Position, SessionInfo, TranscriptTurn, TurnStatus
from sessile.tool_run import OnToolError, ToolRun, ToolRunOptions
from sessile.tools import FunctionTool
from sessile.transport import RetryPolicy, Transport, built
from sessile.turn import OnAbandon, Turn
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

TRANSCRIPT_PAGE = 100


class _Seen:
    """What a handle knows of its session; shared with the handles of ``with_options``."""

    __slots__ = ("head", "info", "turn_index")

    def __init__(self) -> None:
        self.info: SessionInfo | None = None
        self.head: Position | None = None
        self.turn_index = 0


class Session:
    """A handle. It remembers where the ledger ended when it last saw it and sends that with each
    turn: if the ledger is another one now, the turn is refused (StaleClient, DataLoss) instead of
    silently continuing a history that this client does not know. A handle made from an id alone
    knows nothing until its first turn or :meth:`refresh`."""

    def __init__(
        self,
        transport: Transport,
        session_id: str,
        info: SessionInfo | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        self._transport = transport
        self.session_id = session_id
        """Names the session: ``client.session(session_id)`` is another handle to it."""
        self._tools = tuple(tools)
        self._seen = _Seen()
        if info is not None:
            self._learn(info)

    def __repr__(self) -> str:
        return f"Session({self.session_id!r})"

    @property
    def info(self) -> SessionInfo | None:
        """The record as last read; not updated by turns. None before the first read."""
        return self._seen.info

    @property
    def head(self) -> Position | None:
        """End of the ledger as far as this handle knows."""
        return self._seen.head

    def with_options(
        self, *, timeout_s: float | None = None, retry: RetryPolicy | None = None
    ) -> Session:
        """This handle under another ``timeout_s`` (seconds, of calls other than turns) or retry
        policy; what is left out stays. What either learns of the session the other knows too."""
        view = copy.copy(self)
        view._transport = self._transport.with_options(timeout_s, retry)
        return view

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
        """A turn, to be iterated or awaited by ``result()``; see :class:`sessile.Turn`.

        ``turn_id`` makes it idempotent over process restarts too: a repeat attaches to the running
        turn or replays the ended one. The server ends the turn as FAILED after ``timeout_s``
        (default 600). ``priority`` (default: the client's) says whether it goes before others under
        load; on a repeat it changes nothing. ``check_head=False`` accepts whatever the ledger
        holds."""
        request = built(
            lambda: pb.RunTurnRequest(
                session_id=self.session_id,
                turn_id=turn_id or self._transport.runtime.new_id(),
                messages=messages_to_pb(messages),
                params=sampling_to_pb(sampling),
                priority=self._priority(priority),
                timeout_ms=0 if timeout_s is None else max(1, round(timeout_s * 1000)),
            )
        )
        if check_head and self._seen.head is not None:
            request.precondition.CopyFrom(
                pb.Precondition(head=self._seen.head.to_pb(), turn_index=self._seen.turn_index)
            )
        return self._turn(request, timeout_s, on_abandon)

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
        """Turns until the model answers without asking for a tool; calls the functions in between.
        To be iterated or awaited by ``result()``; see :class:`sessile.ToolRun`.

        ``tools`` are made by :func:`sessile.tool` (default: those given to ``open``); the model
        knows only tools that the session was opened with. ``run_id`` (at most 120 characters)
        makes the run idempotent over process restarts too: a repeat goes on where it stopped. A
        turn takes ``timeout_s`` seconds at most, a tool ``tool_timeout_s``; all turns have the
        ``priority``; ``max_parallel`` tools
        run at once. After ``max_rounds`` turns ToolRoundsExceeded is raised. ``on_tool_error`` is
        ``"tell"`` (the model) or ``"raise"`` (ToolFailed)."""
        options = ToolRunOptions(
            run_id=run_id or self._transport.runtime.new_id(),
            max_rounds=max_rounds,
            max_parallel=max_parallel,
            tool_timeout_s=tool_timeout_s,
            on_tool_error=on_tool_error,
        )

        def begin(turn_id: str, given: Input) -> Turn:
            return self.run(
                given,
                turn_id=turn_id,
                timeout_s=timeout_s,
                priority=priority,
                on_abandon=on_abandon,
                check_head=check_head,
                **sampling,
            )

        return ToolRun(
            begin,
            partial(self.attach, timeout_s=timeout_s, priority=priority, on_abandon=on_abandon),
            messages,
            self._functions(self._tools if tools is None else tools),
            options,
            self._transport.tracing,
            self.session_id,
        )

    def attach(
        self,
        turn_id: str,
        *,
        resume_from: Position | None = None,
        timeout_s: float | None = None,
        priority: Priority | None = None,
        on_abandon: OnAbandon = "detach",
    ) -> Turn:
        """Reads a turn that exists, running or ended, from ``resume_from`` (a ``Tokens.end`` or
        ``turn.position``) or from its first output. NotFound if there is no such turn, DataLoss
        if ``resume_from`` says that there was. ``priority`` (default: the client's) only tells the
        server's metrics what the stream is for; the turn keeps its own. Abandoning detaches by
        default: the turn may be somebody else's."""
        request = built(
            lambda: pb.RunTurnRequest(
                session_id=self.session_id,
                turn_id=turn_id,
                attach_only=True,
                priority=self._priority(priority),
                resume_from=None if resume_from is None else resume_from.to_pb(),
            )
        )
        return self._turn(request, timeout_s, on_abandon)

    async def cancel(self, turn_id: str) -> TurnStatus:
        """Ends a turn by its id. Idempotent; an unknown id is remembered for a short time."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.CancelTurn,
            lambda: session_pb2.CancelTurnRequest(session_id=self.session_id, turn_id=turn_id),
        )
        return TurnStatus.from_pb(response.status)

    async def refresh(self) -> SessionInfo:
        """Reads the record; from here on the handle trusts what it says about the ledger."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.GetSession,
            lambda: session_pb2.GetSessionRequest(session_id=self.session_id),
        )
        return self._learn(SessionInfo.from_pb(response.session))

    async def fork(
        self,
        *,
        at_turn: int | None = None,
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Session:
        """A session with this one's history up to ``at_turn`` turns (default: the last turn
        boundary). Copies nothing. ``request_id`` makes it idempotent."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.ForkSession,
            lambda: session_pb2.ForkSessionRequest(
                request_id=request_id or self._transport.runtime.new_id(),
                session_id=self.session_id,
                at_turn_index=at_turn,
                labels=labels,
            ),
        )
        info = SessionInfo.from_pb(response.session)
        return Session(self._transport, info.session_id, info, self._tools)

    async def suspend(self) -> SessionInfo:
        """Frees what the session holds on replicas and keeps its ledger. WrongState while a turn
        runs."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.SuspendSession,
            lambda: session_pb2.SuspendSessionRequest(session_id=self.session_id),
        )
        return self._learn(SessionInfo.from_pb(response.session))

    async def resume(self) -> SessionInfo:
        """Opens a suspended session again."""
        response = await self._transport.call(
            lambda gateway: gateway.sessions.ResumeSession,
            lambda: session_pb2.ResumeSessionRequest(session_id=self.session_id),
        )
        return self._learn(SessionInfo.from_pb(response.session))

    async def close(self, *, retention_s: float | None = None, purge: bool = False) -> None:
        """Ends the session; a running turn ends CANCELLED. Its transcript stays readable for
        ``retention_s`` (default: the server's), or is removed at once with ``purge``."""
        await self._transport.call(
            lambda gateway: gateway.sessions.CloseSession,
            lambda: session_pb2.CloseSessionRequest(
                session_id=self.session_id,
                retention_ms=0 if retention_s is None else round(retention_s * 1000),
                purge=purge,
            ),
        )

    async def transcript(
        self, *, from_turn: int = 0, token_ids: bool = False
    ) -> list[TranscriptTurn]:
        """Every turn from ``from_turn`` on, read page by page."""
        turns: list[TranscriptTurn] = []
        while True:
            response = await self._transport.call(
                lambda gateway: gateway.sessions.GetTranscript,
                partial(
                    session_pb2.GetTranscriptRequest,
                    session_id=self.session_id,
                    from_turn_index=from_turn,
                    max_turns=TRANSCRIPT_PAGE,
                    include_token_ids=token_ids,
                ),
            )
            turns.extend(TranscriptTurn.from_pb(turn) for turn in response.turns)
            if response.next_turn_index <= from_turn:
                return turns
            from_turn = response.next_turn_index

    async def watch(self) -> AsyncGenerator[SessionInfo, None]:
        """The record now and after each change (changes in quick succession are merged), until the
        session is closed. Connects again as often as the retry policy allows."""
        states = self._transport.follow(
            lambda gateway: gateway.sessions.WatchSession,
            lambda _: session_pb2.WatchSessionRequest(session_id=self.session_id),
        )
        async with aclosing(states):
            async for response in states:
                yield SessionInfo.from_pb(response.session)

    def _priority(self, priority: Priority | None) -> pb.TurnPriority.ValueType:
        return Priority(priority or self._transport.priority).to_pb()

    def _functions(self, tools: Sequence[Tool]) -> dict[str, FunctionTool]:
        known = {tool.name for tool in self._tools}
        functions: dict[str, FunctionTool] = {}
        for tool in tools:
            if not isinstance(tool, FunctionTool):
                raise _unusable(f"{tool!r} has no function.", "Make it one by @sessile.tool.")
            if tool.name in functions:
                raise _unusable(f"two tools are called {tool.name}.", "Name one @tool(name=…).")
            if known and tool.name not in known:
                raise _unusable(
                    f"the session was opened without the tool {tool.name}.",
                    "Open a session with all the tools that the model is to know.",
                )
            functions[tool.name] = tool
        if not functions:
            raise _unusable("there are no tools.", "Give them to open() or to run_tools().")
        return functions

    def _turn(
        self, request: pb.RunTurnRequest, timeout_s: float | None, on_abandon: OnAbandon
    ) -> Turn:
        return Turn(
            self._transport,
            request,
            timeout_s=timeout_s,
            on_abandon=on_abandon,
            on_end=self._turn_ended,
            model=self._seen.info.model if self._seen.info is not None else "",
        )

    def _turn_ended(self, accepted: Accepted | None, finished: Finished | None) -> None:
        """A turn of this handle ended, or its end was not seen (None): then nothing is certain."""
        if finished is None or accepted is None:
            self._seen.head = None
        elif self._seen.head is None and accepted.attached:
            return  # an old turn, perhaps: its end need not be the ledger's
        elif self._seen.head is None or accepted.turn_index >= self._seen.turn_index:
            self._seen.head, self._seen.turn_index = finished.end, accepted.turn_index + 1

    def _learn(self, info: SessionInfo) -> SessionInfo:
        self._seen.info = info
        # While a turn runs, the ledger's end moves: no ground for a precondition.
        self._seen.head = None if info.active_turn_id else info.head
        self._seen.turn_index = info.turn_index
        return info


def _unusable(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_REQUEST", hint=hint)
