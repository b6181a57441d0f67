"""What happened to each session, in true virtual time: for whoever has to explain a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from loadtest.simulation.loop import current_process

MAX_LINES = 160
"""Lines of one session's timeline; the middle is left out over it."""
FIRST_LINES = 40

Entry = tuple[float, str, str, str, str]
"""Time, session (empty: concerns all), who, what was done, details."""


class Timeline:
    """Notes are cheap: they are made all the time, and read after a failure only."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._entries: list[Entry] = []

    def note(self, session_id: str, what: str, details: str = "") -> None:
        """``what`` names a kind of event: repeats of one are told in one line."""
        process = current_process()
        who = "" if process is None else process.name
        self._entries.append((self._now(), session_id, who, what, details))

    def of(self, session_id: str) -> list[str]:
        """The session's lines, with what concerns all sessions among them."""
        lines = list(self._lines(session_id))
        if len(lines) > MAX_LINES:
            left_out = len(lines) - MAX_LINES
            rest = lines[left_out + FIRST_LINES :]
            lines = [*lines[:FIRST_LINES], f"          … {left_out} lines …", *rest]
        return lines

    def _lines(self, session_id: str) -> Iterator[str]:
        mine = (entry for entry in self._entries if entry[1] in ("", session_id))
        for (_, who, what), group in groupby(mine, lambda e: e[1:4]):
            same = list(group)
            times = f" x{len(same)}" if len(same) > 1 else ""
            yield f"{same[0][0]:9.4f} {who or '-':<4} {what}{times} {same[-1][4]}".rstrip()
