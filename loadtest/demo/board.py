"""What has happened so far: written by the agents and the director, read by everybody else.

Everything runs on one event loop, so a reader always sees a consistent state.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import anyio
from sessile import Finished, Moved, TurnResult

Found = TypeVar("Found")


class Phase(enum.StrEnum):
    """What an agent is doing."""

    STARTING = "starting"
    TOOL = "tool"
    RUNNING = "turn"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One Tokens event as the agent received it."""

    at_s: float
    position: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MoveSeen:
    """A Moved event, with how long the stream stood still around it. ``gap_s`` is None if no token
    followed, or none went before."""

    event: Moved
    at_s: float
    gap_s: float | None


@dataclass(slots=True)
class TurnLog:
    """One turn as one agent saw it. Times are the event loop's, in seconds."""

    turn_id: str
    began_s: float
    replica: str = ""
    """Where it was accepted."""
    output_start: int = 0
    cached_tokens: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    moved: list[tuple[float, Moved]] = field(default_factory=list)
    finished: Finished | None = None
    result: TurnResult | None = None

    @property
    def tokens(self) -> int:
        return sum(len(arrival.token_ids) for arrival in self.arrivals)

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals[0].at_s - self.began_s if self.arrivals else None

    @property
    def last_replica(self) -> str:
        return self.moved[-1][1].target.replica_id if self.moved else self.replica

    def moves(self) -> Iterator[MoveSeen]:
        for at_s, event in self.moved:
            before = [arrival.at_s for arrival in self.arrivals if arrival.at_s <= at_s]
            after = [arrival.at_s for arrival in self.arrivals if arrival.at_s > at_s]
            gap_s = after[0] - before[-1] if before and after else None
            yield MoveSeen(event, at_s, gap_s)

    def longest_gap_after(self, at_s: float) -> float | None:
        """Longest pause between two arrivals that ended after ``at_s``."""
        times = [arrival.at_s for arrival in self.arrivals]
        gaps = [later - sooner for sooner, later in pairwise(times) if later > at_s]
        return max(gaps, default=None)


@dataclass(slots=True)
class AgentState:
    """One agent. Only the agent writes it, but for ``held``."""

    name: str
    module: str
    gateway: int
    """Index of the gateway its client starts with."""
    session_id: str = ""
    phase: Phase = Phase.STARTING
    activity: str = ""
    turns: list[TurnLog] = field(default_factory=list)
    error: str = ""
    held: bool = False
    """The director keeps it in its tool gap."""

    @property
    def turn(self) -> TurnLog | None:
        """The turn that runs now."""
        return self.turns[-1] if self.phase is Phase.RUNNING else None

    @property
    def replica(self) -> str:
        return self.turns[-1].last_replica if self.turns else ""

    @property
    def finished_turns(self) -> int:
        return sum(turn.finished is not None for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line."""

    at_s: float
    text: str
    fault: bool = False


class Board:
    """The state of the run. ``say`` and ``changed`` wake whoever waits for a condition."""

    def __init__(self, agents: list[AgentState], on_event: Callable[[Event], None]) -> None:
        self.agents = agents
        self.events: list[Event] = []
        self.faults_done = False
        self._on_event = on_event
        self._changed = anyio.Event()
        self._started_s = anyio.current_time()

    @property
    def elapsed_s(self) -> float:
        return anyio.current_time() - self._started_s

    @property
    def finished_turns(self) -> int:
        return sum(agent.finished_turns for agent in self.agents)

    def changed(self) -> None:
        """Call after every change that somebody may wait for."""
        self._changed.set()
        self._changed = anyio.Event()

    def say(self, text: str, *, fault: bool = False) -> None:
        event = Event(self.elapsed_s, text, fault)
        self.events.append(event)
        self._on_event(event)
        self.changed()

    async def wait_for(self, find: Callable[[], Found | None]) -> Found:
        """The first thing that ``find`` finds, looked for at each change."""
        while True:
            found = find()
            if found is not None:
                return found
            await self._changed.wait()
