"""The audit log: what operators did, to what, from where, and how it ended.

One JSON object a line. An action is written before it begins, so one that cannot be written is not
done, and again when it ends.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gateway.security.access import Caller

log = logging.getLogger("sessile.audit")

MAX_TEXT_CHARS = 256
"""Of one value: a caller chooses some of them."""


@dataclass(frozen=True, slots=True)
class Action:
    """One call."""

    rpc: str
    target: Mapping[str, str]
    peer: str


class AuditLog:
    """Appends to a file, which is opened for each line: it may be rotated by renaming it. Without a
    path lines only go to the logger ``sessile.audit``."""

    def __init__(
        self, path: Path | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._now = now

    def check(self) -> None:
        """Raises OSError if the file cannot be written."""
        self._append(b"")

    def write(self, caller: Caller, action: Action, outcome: str) -> None:
        """``outcome``: BEGUN, then OK, CANCELLED or an error's reason. Raises OSError if the line
        could not be written."""
        entry = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "who": _cut(caller.name or "anonymous"),
            "role": str(caller.role),
            "tenant": caller.tenant,
            "peer": _cut(action.peer),
            "action": action.rpc,
            "target": {name: _cut(value) for name, value in action.target.items()},
            "outcome": outcome,
        }
        line = json.dumps(entry, ensure_ascii=True)
        log.info("%s", line)
        self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while line:
                line = line[os.write(file, line) :]
        finally:
            os.close(file)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"
