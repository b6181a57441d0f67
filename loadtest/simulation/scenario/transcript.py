"""What is seen of a scenario, as the lines that are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import anyio
from sessile.v1 import types_pb2 as pb

from gateway.app.ports import ReplicaLost
from gateway.core.errors import SessileError
from loadtest.simulation.clients.heard import TurnHeard
from statestore.records import ReplicaRef


@dataclass(eq=False)
class Client:
    """A caller of RunTurn."""

    name: str
    heard: TurnHeard
    tenant: str
    slow_s: float
    kinds: list[str] = field(default_factory=list)
    listening: bool = False
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    tokens_from: int | None = None
    """First position of a run of tokens that is not shown yet."""


class Transcript:
    """What clients heard and commands told, with the script's names for everything."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self.sessions: dict[str, str] = {}
        self.changed = anyio.Event()
        self._lines: list[str] = []
        self._incarnations: dict[str, list[int]] = {}

    def seen(self) -> str:
        """What happened since the last call."""
        self._show_all_tokens()
        lines, self._lines = self._lines, []
        return "\n".join(lines) or "ok"

    def hear(self, client: Client, event: pb.TurnEvent) -> None:
        kind = event.WhichOneof("event") or "?"
        client.kinds.append(kind)
        if kind == "tokens":
            if client.tokens_from is None:
                client.tokens_from = event.tokens.position
        elif kind == "accepted":
            accepted = event.accepted
            line = f"accepted at {accepted.output_start.length} on {self.ref(accepted.replica)}"
            line += f", attempt {accepted.attempt}" if accepted.attempt > 1 else ""
            self.tell(client, line + (", attached" if accepted.attached else ""))
        elif kind == "waiting":
            self.tell(client, f"waits ({_word(pb.TurnWaiting.Reason, event.waiting.reason)})")
        elif kind == "moved":
            moved, reason = event.moved, _word(pb.TurnMoved.Reason, event.moved.reason)
            line = f"moved from {self.ref(getattr(moved, 'from'))} to {self.ref(moved.to)}"
            self.tell(client, f"{line} ({reason}), attempt {moved.attempt}")
        elif kind == "finished":
            end = event.finished
            line = (
                f"{_word(pb.TurnStatus, end.status).upper()} ({_word(pb.FinishReason, end.reason)})"
            )
            line += f" at {end.end.length}, {end.usage.cached_tokens} cached"
            self.tell(client, line + (f": {end.error}" if end.error else ""))
        self.notify()

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def tell(self, client: Client, line: str) -> None:
        self._show_tokens(client)
        if self._lines[-1:] != [f"{client.name}: {line}"]:
            self._lines.append(self._plain(f"{client.name}: {line}"))

    def _show_all_tokens(self) -> None:
        for client in self.clients.values():
            self._show_tokens(client)

    def _show_tokens(self, client: Client) -> None:
        start, client.tokens_from = client.tokens_from, None
        if start is not None:
            assert client.heard.start is not None
            end = client.heard.start.length + len(client.heard.tokens)
            self._lines.append(f"{client.name}: tokens {start}..{end}")

    def say(self, line: str) -> None:
        self._show_all_tokens()
        self._lines.append(self._plain(line))

    def _plain(self, line: str) -> str:
        """The line without what differs from run to run, or says nothing to a reader."""
        for name, session_id in self.sessions.items():
            line = line.replace(session_id, name)
        return re.sub(r"(\w+)#(\d+)", lambda m: self.ref(ReplicaRef(m[1], int(m[2]))), line)

    def name(self, session_id: str) -> str:
        names = [name for name, known in self.sessions.items() if known == session_id]
        return names[0] if names else "?"

    def ref(self, ref: Any) -> str:
        known = self._incarnations.setdefault(ref.replica_id, [])
        if ref.incarnation not in known:
            known.append(ref.incarnation)
        return str(ref.replica_id) + "'" * known.index(ref.incarnation)


def _word(enum: Any, value: int) -> str:
    """The last part of an enum value's name."""
    prefix = {"TurnStatus": "TURN_STATUS_", "FinishReason": "FINISH_REASON_"}
    name: str = enum.Name(value)
    return name.removeprefix(prefix.get(enum.DESCRIPTOR.name, "REASON_")).lower()


def refusal(error: SessileError) -> str:
    """What a script calls an error."""
    if isinstance(error, ReplicaLost):
        return "connection lost"
    later = ", retry later" if error.retry_after_ms else ""
    return f"{error.reason}{later}"
