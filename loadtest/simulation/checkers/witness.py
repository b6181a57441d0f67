"""Watches every write to the store, and notes what no sequence of writes may do.

* I1: a ledger only grows, under the epoch of its owner and by its owner's process; epochs only
  grow.
* I3: one turn of a session runs at most, and it is the active one; a turn that has ended stays as
  it ended.
* I4, P11: nobody places a session on a replica, takes one to it or begins to move one there after
  reading in the store that it is gone or was replaced, or that it drains.
* I7: when each turn was due and when it ended; no turn is dropped.
* P1: a head has the digest of its ledger's tokens; a repair puts back what was lost.
* P2: a closed session is never open again; an epoch's number is granted once and to one owner,
  whatever the store loses, and nobody repairs under one that was not granted.
* P4: a turn that was cancelled before it began does not begin; one that is past its deadline ends.
* P5: a turn is committed with its last tokens.
* P10: no session is taken in mid-turn from a process that goes on beating and was not reset.
* P12: a move is switched at the ledger and turn that its target verified.
* P14: a session goes only where its tokens are understood.

What a step between two records must not be is in :mod:`loadtest.simulation.checkers.rules`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loadtest.simulation.checkers.heartbeats import REGULAR_S, Heartbeats
from loadtest.simulation.checkers.ledgers import Ledgers, Stored
from loadtest.simulation.checkers.lives import Life, Lives
from loadtest.simulation.checkers.rules import illegal
from loadtest.simulation.checkers.stored import ENDED, Ref, Seen, as_bytes, seen
from loadtest.simulation.loop import Process, current_process
from loadtest.simulation.tally import Tally
from loadtest.simulation.timeline import Timeline
from statestore import keys
from statestore.executor import Reply, ScriptCall

TARGET_ARGS = {"place": 2, "take": 2, "begin_migration": 3}
"""Scripts that choose a replica -> where its id is among their arguments."""
OWNERS_WRITE = frozenset({b"appended", b"begun", b"resumed"})
"""Outcomes of what only the owner's process can have asked for."""
NEW_OWNERS = frozenset({"place", "take", "switch_migration"})


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """When a turn was due and when it ended, in true virtual seconds."""

    session_id: str
    turn_id: str
    deadline_s: float
    ended_s: float
    failed: bool


class Witness:
    """``peek`` reads a key of the store, ``now_s`` is the virtual time and ``start_us`` the store's
    clock at its zero; ``whose`` tells the replica that a process is, ``lives`` whether there is one
    that is not stopped. ``violations`` are found while the world runs and must be looked at in the
    end: raising inside a script would only look like a bug of its caller."""

    def __init__(
        self,
        peek: Callable[[str], Stored],
        timeline: Timeline | None = None,
        now_s: Callable[[], float] = lambda: 0.0,
        start_us: int = 0,
        tally: Tally | None = None,
        whose: Callable[[Process], Ref | None] = lambda _: None,
        lives: Callable[[Ref], bool] = lambda _: False,
    ) -> None:
        self.violations: list[str] = []
        self.ended: list[TurnTimes] = []
        self.heartbeats = Heartbeats(lives)
        self.moved: Callable[[str, Ref, bytes], None] = lambda *_: None
        """Told of each move that was switched, but for those of a drain, which may recompute:
        session, new owner, ledger."""
        self.tally = tally or Tally(Counter(), lambda _: False, whose, now_s)
        self._peek = peek
        self._timeline = timeline
        self._now_s = now_s
        self._start_us = start_us
        self._whose = whose
        self._seen: dict[str, Seen] = {}
        self._ledgers = Ledgers(peek)
        self.lost_s: float | None = None
        """When the store last lost writes."""
        self._granted: dict[tuple[str, int], tuple[bytes, Ref]] = {}
        """Session and number of each epoch there ever was -> its nonce, and to whom it went."""
        self._written: dict[tuple[str, tuple[int, bytes]], bytes] = {}
        """Session and epoch -> the last ledger that there was under it, lost or not."""
        self._lives = Lives()
        self._tombstones: dict[tuple[str, bytes], int] = {}
        """Session and turn that was cancelled before it began -> until when, store's ms."""
        self._unfit_since: dict[Ref, float] = {}
        self._fit_since: dict[Ref, float] = {}
        """Whose drain was undone -> when."""
        self._gone: set[Ref] = set()
        """Who ever was gone or replaced: whatever the store loses, none of them comes back."""
        self._read_at: dict[Process, float] = {}
        """Process -> when the last reading of the fleet that it got was made."""
        self._knows: dict[Process, float] = {}
        """The same of the reading before: it asks again only after it has taken the last one in."""
        self._informed: dict[ScriptCall, float] = {}
        """Choice of a replica -> when the fleet it was chosen from was read."""

    # -- what happens -------------------------------------------------------------------------

    def issued(self, process: Process, calls: Sequence[ScriptCall]) -> None:
        """A process is about to send calls. A repeat of a call was decided when it was first
        sent."""
        for call in calls:
            if call.script.name == "fleet":
                self._knows[process] = self._read_at.get(process, 0.0)
            elif call.script.name in TARGET_ARGS:
                self._informed.setdefault(call, self._knows.get(process, 0.0))

    def answered(self, process: Process, calls: Sequence[ScriptCall], applied_s: float) -> None:
        """A process gets its answers."""
        self._lives.answered(process, calls, self._now_s())
        if any(call.script.name == "fleet" for call in calls):
            self._read_at[process] = applied_s
            self.heartbeats.read(process, applied_s, self._now_s())

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        script = call.script.name
        self._lives.replied(call, _outcome(reply))
        if script in ("mark_replica", "register"):
            self._look_at_fleet()
        elif script == "heartbeat" and _outcome(reply) == b"done":
            ref = (as_bytes(call.args[0]), as_bytes(call.args[1]))
            self.heartbeats.beat(ref, int(call.args[2]), self._now_s())
        if script.startswith("read_"):
            return
        for key in call.keys:
            _, found, session_id = key.partition(":s:")
            if found:
                self._look(session_id, call, _outcome(reply))

    def restarted(self) -> None:
        """The server ends, and comes back with all its data."""
        self.tally.restarted(self._seen)

    def forget(self) -> None:
        """The server has just lost writes: what follows is judged against what it has then."""
        self.lost_s = self._now_s()
        self.tally.lost(self._seen)
        for session_id, before in [*self._seen.items()]:
            now = self._read(session_id, ())
            if now is None:
                del self._seen[session_id]
            else:
                self._seen[session_id] = now
            self._lives.lost(session_id, before, now, self._now_s())
            if now is not None and now.epoch != before.epoch:
                self.heartbeats.went_astray(session_id)
        self._tombstones.clear()
        self._unfit_since.clear()
        self._look_at_fleet()
        self.heartbeats.lost(self._counts(), self._now_s())
        self._read_at.clear()
        self._knows.clear()
        self._informed.clear()
        if self._timeline is not None:
            self._timeline.note("", "the store has lost writes")

    # -- replicas -----------------------------------------------------------------------------

    def is_unfit(self, ref: Ref) -> bool:
        """The store has it as draining, or had it as gone or replaced."""
        return ref in self._unfit_since or ref in self._gone

    def surely_fit(self, ref: Ref) -> bool:
        """Everybody must know that it takes sessions, as far as the store says."""
        known_s = self._now_s() - self._fit_since.get(ref, -REGULAR_S)
        return not self.is_unfit(ref) and known_s >= REGULAR_S

    def _look_at_fleet(self) -> None:
        fleet = self._peek(keys.FLEET)
        assert isinstance(fleet, dict)
        for name, incarnation in fleet.items():
            if name[:4] != b"inc:":
                continue
            ref = (name[4:], incarnation)
            for other in [r for r in self._unfit_since if r[0] == ref[0]]:
                if other == ref and not _unfit(fleet, ref[0]):
                    del self._unfit_since[ref]
                    self._fit_since[ref] = self._now_s()
            if _unfit(fleet, ref[0]):
                self._unfit_since.setdefault(ref, self._now_s())
            if fleet.get(b"gone:" + ref[0]) == b"1":
                self._gone.add(ref)
            previous = fleet.get(b"replaced:" + ref[0])
            if previous is not None:
                self._unfit_since.setdefault((ref[0], previous), self._now_s())
                self._gone.add((ref[0], previous))

    def _counts(self) -> dict[Ref, int]:
        fleet = self._peek(keys.FLEET)
        assert isinstance(fleet, dict)
        return {
            (name[4:], incarnation): int(fleet.get(b"beat:" + name[4:], b"0"))
            for name, incarnation in fleet.items()
            if name[:4] == b"inc:"
        }

    def _chosen(self, call: ScriptCall) -> list[str]:
        at = TARGET_ARGS[call.script.name]
        ref = (as_bytes(call.args[at]), as_bytes(call.args[at + 1]))
        read_s, since = self._informed.get(call, 0.0), self._unfit_since.get(ref)
        if not ref[0] or since is None or since >= read_s:
            return []
        name = f"{ref[0].decode()}#{ref[1].decode()}"
        rule = "I4" if ref in self._gone else "P11"
        return [f"{rule}: to {name}, known not to take sessions since {since:.3f} s"]

    # -- sessions -----------------------------------------------------------------------------

    def _look(self, session_id: str, call: ScriptCall, outcome: bytes) -> None:
        script = call.script.name
        before = self._seen.get(session_id)
        known = () if before is None or script == "repair" else before.turns
        now = self._read(session_id, known)
        if now is None:
            self._seen.pop(session_id, None)  # purged (but for what forks need), or never opened
            return
        self._seen[session_id] = now
        record = self._record(session_id)
        active = [record[b"active"]] if record.get(b"active") else []
        wrong = [] if now.running == active else [f"I3: {now.running} run, {active} is active"]
        if before is not None:
            lost = None
            if self.lost_s is not None:
                lost = self._written.get((session_id, now.epoch), b"")
            wrong += illegal(before, now, call, outcome, self._store_ms(), lost)
            leaving = before.owner in self._unfit_since
            self.tally.count(
                session_id, before, now, call, outcome, current_process(), leaving=leaving
            )
            self._note_ends(session_id, before, now)
        if before is None or (before.head, before.ledger) != (now.head, now.ledger):
            wrong += self._ledgers.judge(session_id, record)
        if script in TARGET_ARGS and outcome == b"written":
            wrong += self._chosen(call)
        self._written[session_id, now.epoch] = now.ledger
        wrong += self._of_epoch(session_id, before, now, call)
        wrong += self._of_process(before, now, call, outcome)
        wrong += self._of_tombstones(session_id, before, now, call, outcome)
        self.violations += [f"{session_id}: after {script}: {what}" for what in wrong]
        if self._timeline is not None:
            self._tell(session_id, script, outcome, record)

    def _record(self, session_id: str) -> dict[bytes, bytes]:
        record = self._peek(keys.session_key(session_id))
        return record if isinstance(record, dict) else {}

    def _read(self, session_id: str, known: Iterable[bytes]) -> Seen | None:
        record, ledger = self._record(session_id), self._peek(keys.ledger_key(session_id)) or b""
        assert isinstance(ledger, bytes)
        return seen(record, ledger, known) if b"epoch" in record else None

    def _note_ends(self, session_id: str, before: Seen, now: Seen) -> None:
        for name, turn in now.turns.items():
            known = before.turns.get(name)
            if known is not None and known.status not in ENDED and turn.status in ENDED:
                due_s = turn.deadline_ms / 1000 - self._start_us / 1_000_000
                failed = turn.status == b"FAILED"
                times = TurnTimes(session_id, name.decode(), due_s, self._now_s(), failed)
                self.ended.append(times)

    def _store_ms(self) -> int:
        return int(self._start_us / 1000 + self._now_s() * 1000)

    def _of_epoch(
        self, session_id: str, before: Seen | None, now: Seen, call: ScriptCall
    ) -> list[str]:
        number, nonce = now.epoch
        if before is not None and before.epoch == now.epoch:
            return []
        repaired = call.script.name == "repair"
        if repaired and (session_id, number) not in self._granted:
            return [f"P2: {now.owner} repaired under epoch {number}, which nobody was granted"]
        granted = self._granted.setdefault((session_id, number), (nonce, now.owner))
        if granted[0] != nonce:
            return [f"P2: epoch {number} was granted before"]
        if now.owner[0] and granted[1] != now.owner:
            return [f"P2: epoch {number} of {granted[1]} is now that of {now.owner}"]
        self._lives.began(session_id, before, now, call, self._now_s())
        if before is None:
            return []
        if call.script.name == "take" and before.active and before.owner not in self._unfit_since:
            wrong = self.heartbeats.judge_taking(
                current_process(), session_id, before.owner, self._now_s()
            )
            self.heartbeats.has_owner(session_id)
            return [] if wrong is None else [wrong]
        self.heartbeats.has_owner(session_id)
        if call.script.name == "switch_migration" and before.owner not in self._unfit_since:
            self.moved(session_id, now.owner, now.ledger)
        return []

    def lives(self, session_id: str, process: Process | None, epoch: int) -> list[Life]:
        """What a run of this process may take for the ledger of a session: as it is, and as it
        was before losses that the process cannot have heard of."""
        seen = self._seen.get(session_id)
        now = [] if seen is None else [self._lives.now(session_id, seen)]
        return [*now, *self._lives.former(session_id, process, epoch)]

    def has_lost(self, session_id: str) -> bool:
        """Whether the store ever lost anything of the session, or a repair gave some of it up."""
        return self._lives.any_former(session_id)

    def owner(self, session_id: str) -> Ref:
        """Who has the session, as far as the store says."""
        return self._seen.get(session_id, Seen()).owner

    def fingerprint(self, session_id: str) -> bytes:
        """Of the session's tokens, as far as the store says; empty if it has none."""
        return self._seen.get(session_id, Seen()).fingerprint

    def stand(self, session_id: str, turn_id: str) -> tuple[int, bytes]:
        """How far a session's ledger goes, and the turn's status."""
        seen = self._seen.get(session_id, Seen())
        turn = seen.turns.get(turn_id.encode())
        return len(seen.ledger), b"" if turn is None else turn.status

    def runs(self, session_id: str, turn_id: str) -> bool:
        """Whether the turn is active, as far as the store has it."""
        seen = self._seen.get(session_id)
        return seen is not None and turn_id.encode() in seen.running

    def _of_process(
        self, before: Seen | None, now: Seen, call: ScriptCall, outcome: bytes
    ) -> list[str]:
        owner, wrong = now.owner, []
        process = current_process()
        writer = None if process is None else self._whose(process)
        wrote = outcome in OWNERS_WRITE
        if wrote and owner[0] and writer is not None and writer != owner:
            wrong.append(f"I1: {writer} wrote, {owner} owns it")
        placed = call.script.name in NEW_OWNERS and outcome == b"written"
        if (wrote or placed) and before is not None and before.fingerprint and owner[0]:
            fleet = self._peek(keys.FLEET)
            details = fleet.get(b"details:" + owner[0]) if isinstance(fleet, dict) else None
            if details is not None:
                speaks = json.loads(details)["token_fingerprint"]
                if speaks != before.fingerprint.hex():
                    wrong.append(f"P14: {owner} has another tokenizer")
        return wrong

    def _of_tombstones(
        self, session_id: str, before: Seen | None, now: Seen, call: ScriptCall, outcome: bytes
    ) -> list[str]:
        if call.script.name == "cancel" and outcome == b"unknown" and now.state != b"CLOSED":
            until_ms = self._store_ms() + int(call.args[1])
            self._tombstones[session_id, as_bytes(call.args[0])] = until_ms
        if call.script.name == "begin" and outcome == b"begun":
            turn = as_bytes(call.args[4])
            new = before is not None and turn not in before.turns
            if new and self._tombstones.get((session_id, turn), 0) > self._store_ms():
                return [f"P4: {turn!r} began, though it was cancelled before"]
        return []

    def _tell(
        self, session_id: str, script: str, outcome: bytes, record: dict[bytes, bytes]
    ) -> None:
        assert self._timeline is not None
        active, owner = record[b"active"], record[b"owner"].decode() or "nobody"
        status = record.get(b"t:" + active + b":status", b"") if active else b"idle"
        self._timeline.note(
            session_id,
            f"{script}: {outcome.decode()}",
            f"{owner} under …{record[b'epoch'].decode()[-7:]}, {record[b'length'].decode()} tokens,"
            f" {active.decode()} {status.decode()}",
        )


def _outcome(reply: Reply) -> bytes:
    first = reply[0] if isinstance(reply, list) and reply else reply
    return first if isinstance(first, bytes) else b""


def _unfit(fleet: dict[bytes, bytes], name: bytes) -> bool:
    return b"1" in (fleet.get(b"draining:" + name), fleet.get(b"gone:" + name))
