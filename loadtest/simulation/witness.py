"""Watches every write to the store, and notes what no sequence of writes may do.

* I1: a ledger only grows, under the epoch of its owner; epochs only grow, a number is granted once.
* I3: one turn of a session runs at most, and it is the active one; a turn that has ended stays as
  it ended.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def _look(self, session_id: str, call: ScriptCall) -> None:
        script = call.script.name
        record = self._peek(keys.session_key(session_id))
        if not isinstance(record, dict):
            self._seen.pop(session_id, None)  # purged, or refused to open
            return
        before = self._seen.setdefault(session_id, _Seen())
        ledger = self._peek(keys.ledger_key(session_id)) or b""
        assert isinstance(ledger, bytes)
        epoch = (int(record[b"epoch"]), record[b"nonce"])
        if not ledger.startswith(before.ledger):
            self._note(script, session_id, "I1: the ledger was rewritten")
        if len(ledger) != len(before.ledger) and call.args[:2] != epoch:
            self._note(script, session_id, f"I1: written under {call.args[:2]}, not {epoch}")
        if epoch != before.epoch and epoch[0] <= before.epoch[0]:
            self._note(script, session_id, f"I1: epoch {epoch} after {before.epoch}")
        owner = (record.get(b"owner", b""), record.get(b"owner_inc", b""))
        if owner[0] and owner != before.owner and epoch == before.epoch:
            self._note(script, session_id, f"I1: {before.owner} became {owner} in one epoch")
        turns = _turns(record, before.turns)
        for name, (status, end) in before.turns.items():
            if status in ENDED and turns.get(name) != (status, end):
                self._note(script, session_id, f"I3: {name!r} was {status!r}, is {turns.get(name)}")
        running = [name for name, (status, _) in turns.items() if status not in ENDED]
        active = [record[b"active"]] if record.get(b"active") else []
        if running != active:
            self._note(script, session_id, f"I3: {running} run, {active} is active")
        self._seen[session_id] = _Seen(ledger, epoch, owner, turns)

    def _note(self, script: str, session_id: str, what: str) -> None:
        self.violations.append(f"{session_id}: after {script}: {what}")


def _turns(
    record: dict[bytes, bytes], before: dict[bytes, tuple[bytes, bytes]]
) -> dict[bytes, tuple[bytes, bytes]]:
    names = [*before]
    active = record.get(b"active")
    if active and active not in before:
        # Turns come to be as the active one; that is when to look at all of them again.
        names = [name[2:-7] for name in record if name[:2] == b"t:" and name[-7:] == b":status"]
    return {
        name: (record[b"t:" + name + b":status"], record.get(b"t:" + name + b":end_len", b""))
        for name in names
        if b"t:" + name + b":status" in record
    }
