"""What happened to each session, in true virtual time: for whoever has to explain a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loadtest.simulation.loop import current_process

MAX_LINES = 160
"""Lines of one session's timeline; the middle is left out over it."""
FIRST_LINES = 40
TOGETHER = 4
"""Repeats of one of so many lines before are counted there: steps of a turn, and who hears them."""

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
        rows: list[tuple[Entry, int, str]] = []
        for entry in self._entries:
            if entry[1] not in ("", session_id):
                continue
            for back in range(1, min(TOGETHER, len(rows)) + 1):
                first, count, _ = rows[-back]
                if first[1:4] == entry[1:4]:
                    rows[-back] = (first, count + 1, entry[4])
                    break
            else:
                rows.append((entry, 1, entry[4]))
        for (at_s, _, who, what, _), count, details in rows:
            times = f" x{count}" if count > 1 else ""
            yield f"{at_s:9.4f} {who or '-':<4} {what}{times} {details}".rstrip()
