"""Watches every write to the store, and notes what no sequence of writes may do.

* I1: a ledger only grows, under the epoch of its owner; epochs only grow, a number is granted once.
* I3: one turn of a session runs at most, and it is the active one; a turn that has ended stays as
  it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from statestore import keys
from statestore.executor import Reply, ScriptCall

ENDED = frozenset({b"COMMITTED", b"CANCELLED", b"FAILED"})
Stored = bytes | dict[bytes, bytes] | object | None


@dataclass(slots=True)
class _Seen:
    ledger: bytes = b""
    epoch: tuple[int, bytes] = (0, b"")
    owner: tuple[bytes, bytes] = (b"", b"")
    turns: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    """Turn -> (status, length of the ledger where it ended; empty while it is active)."""


class Witness:
    """``peek`` reads a key of the store. ``violations`` are found while the world runs and must be
    looked at in the end: raising inside a script would only look like a bug of its caller."""

    def __init__(self, peek: Callable[[str], Stored]) -> None:
        self.violations: list[str] = []
        self._peek = peek
        self._seen: dict[str, _Seen] = {}

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        del reply
        if call.script.name.startswith("read_"):
            return
        for key in call.keys:
            _, found, session_id = key.partition(":s:")
            if found:
                self._look(session_id, call)

    def forget(self) -> None:
        """The server has just lost writes: what follows is judged against what it has then."""
        self._seen.clear()

    def _look(self, session_id: str, call: ScriptCall) -> None:
        script = call.script.name
        record = self._peek(keys.session_key(session_id))
        if not isinstance(record, dict) or b"epoch" not in record:
            self._seen.pop(session_id, None)  # purged (but for what forks need), or never opened
            return
        ledger = self._peek(keys.ledger_key(session_id)) or b""
        assert isinstance(ledger, bytes)
        before = self._seen.get(session_id)
        now = self._seen[session_id] = _Seen(
            ledger,
            (int(record[b"epoch"]), record[b"nonce"]),
            (record.get(b"owner", b""), record.get(b"owner_inc", b"")),
            _turns(record, {} if before is None else before.turns),
        )
        running = [name for name, (status, _) in now.turns.items() if status not in ENDED]
        active = [record[b"active"]] if record.get(b"active") else []
        wrong = [] if running == active else [f"I3: {running} run, {active} is active"]
        if before is not None:
            wrong += _illegal(before, now, call)
        self.violations += [f"{session_id}: after {script}: {what}" for what in wrong]


def _illegal(before: _Seen, now: _Seen, call: ScriptCall) -> list[str]:
    """What a script must not have done to a session."""
    wrong: list[str] = []
    if not now.ledger.startswith(before.ledger) and call.script.name != "repair":
        wrong.append("I1: the ledger was rewritten")
    if len(now.ledger) != len(before.ledger) and call.args[:2] != now.epoch:
        wrong.append(f"I1: written under {call.args[:2]}, not {now.epoch}")
    if now.epoch != before.epoch and now.epoch[0] <= before.epoch[0]:
        wrong.append(f"I1: epoch {now.epoch} after {before.epoch}")
    if now.owner[0] and now.owner != before.owner and now.epoch == before.epoch:
        wrong.append(f"I1: {before.owner} became {now.owner} in one epoch")
    for name, (status, end) in before.turns.items():
        if status in ENDED and now.turns.get(name) != (status, end):
            wrong.append(f"I3: {name!r} was {status!r}, is {now.turns.get(name)}")
    return wrong


def _turns(record: dict[bytes, bytes], known: Iterable[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    names = [*known]
    active = record.get(b"active")
    if not names or (active and active not in names):
        # Turns come to be as the active one; that is when to look at all of them again.
        names = [name[2:-7] for name in record if name[:2] == b"t:" and name[-7:] == b":status"]
    return {
        name: (record[b"t:" + name + b":status"], record.get(b"t:" + name + b":end_len", b""))
        for name in names
        if b"t:" + name + b":status" in record
    }
