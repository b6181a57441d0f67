"""Places where a proxy stops: what is seen on a wire, and who waits for it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import anyio


class Way(enum.Enum):
    """Direction of traffic: towards the server, or back."""

    UP = "up"
    DOWN = "down"


class Verdict(enum.Enum):
    """What becomes of what a breakpoint holds."""

    PASS = "pass"
    """It goes on, even if its sender is gone: late data."""
    DROP = "drop"
    """It is lost, and the connection with it."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Something that passes a link. ``script``: name of the Lua script (empty: another command).
    ``outcome``: a reply's first word. ``offset``: for breakpoints on bytes, how many passed."""

    link: str
    way: Way
    at: float
    script: str = ""
    command: bytes = b""
    session_id: str = ""
    args: tuple[bytes, ...] = ()
    outcome: str = ""
    offset: int = -1

    @property
    def commits(self) -> bool:
        """An append that also ends its turn."""
        return self.script == "append" and len(self.args) > 8 and self.args[8] != b""

    def __str__(self) -> str:
        what = self.script or self.command.decode(errors="replace") or f"byte {self.offset}"
        commit = " that commits" if self.commits else ""
        answer = f" answered {self.outcome!r}" if self.way is Way.DOWN and self.outcome else ""
        return f"{self.link}: {what}{commit} {self.session_id}{answer}".rstrip()


class Breakpoint:
    """Fires once. ``at_byte`` makes the links split their bytes there, so that ``when`` may ask for
    ``offset``."""

    def __init__(
        self,
        way: Way,
        when: Callable[[Sighting], bool],
        *,
        hold: bool = True,
        at_byte: int | None = None,
    ) -> None:
        self.way = way
        self.when = when
        self.holds = hold
        self.at_byte = at_byte
        self.hit = anyio.Event()
        self.sighting: Sighting | None = None
        self._decided = anyio.Event()
        self._verdict = Verdict.PASS

    def decide(self, verdict: Verdict) -> None:
        """Lets go of what is held. Idempotent; the first verdict counts."""
        if not self._decided.is_set():
            self._verdict = verdict
            self._decided.set()

    async def fire(self, sighting: Sighting) -> Verdict:
        self.sighting = sighting
        self.hit.set()
        if self.holds:
            await self._decided.wait()
        return self._verdict
