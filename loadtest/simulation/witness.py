"""Watches every write to the store, and notes what no sequence of writes may do.

* I1: a ledger only grows, under the epoch of its owner and by its owner's process; epochs only
  grow.
* I3: one turn of a session runs at most, and it is the active one; a turn that has ended stays as
  it ended.
* I4: nobody places a session on a replica, takes one to it or begins to move one there after
  reading in the store that it drains, is gone or was replaced.
* I7: when each turn was due and when it ended.
* P2: a closed session is never open again; an epoch's number is granted once, whatever the store
  loses.
* P4: a turn that was cancelled before it began does not begin; one that is past its deadline ends.
* P5: a turn is committed with its last tokens.
* P10: no session is taken in mid-turn from a process that goes on beating and was not reset.
* P12: a move is switched at the ledger and turn that its target verified.
* P14: a session goes only where its tokens are understood.

What a step between two records must not be is in :mod:`loadtest.simulation.rules`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gateway.core.machines import SESSION, SessionEvent, SessionPhase, TurnEvent, TurnPhase
from loadtest.simulation.coverage import Row, transition
from loadtest.simulation.heartbeats import Heartbeats
from loadtest.simulation.loop import Process, current_process
from loadtest.simulation.rules import ENDED, Ref, Seen, SeenTurn, illegal
from loadtest.simulation.timeline import Timeline
from statestore import keys
from statestore.executor import Reply, ScriptCall

Stored = bytes | dict[bytes, bytes] | object | None

TARGET_ARGS = {"place": 2, "take": 2, "begin_migration": 3}
"""Scripts that choose a replica -> where its id is among their arguments."""
MOVED_ON = frozenset({"take", "switch_migration"})
TURN_ENDS = {
    b"COMMITTED": TurnEvent.COMMIT,
    b"CANCELLED": TurnEvent.CANCEL,
    b"FAILED": TurnEvent.FAIL,
}
REFUSALS = frozenset({b"busy", b"limit", b"refused", b"tombstoned"})
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
        coverage: Counter[str] | None = None,
        whose: Callable[[Process], Ref | None] = lambda _: None,
        lives: Callable[[Ref], bool] = lambda _: False,
    ) -> None:
        self.violations: list[str] = []
        self.ended: list[TurnTimes] = []
        self.heartbeats = Heartbeats(lives)
        self.moved: Callable[[str, Ref, bytes], None] = lambda *_: None
        """Told of each move that was switched, but for those of a drain, which may recompute:
        session, new owner, ledger."""
        self.coverage: Counter[str] = Counter() if coverage is None else coverage
        self._peek = peek
        self._timeline = timeline
        self._now_s = now_s
        self._start_us = start_us
        self._whose = whose
        self._seen: dict[str, Seen] = {}
        self._granted: dict[tuple[str, int], bytes] = {}
        """Session and number of each epoch there ever was -> its nonce."""
        self._cut_off: dict[str, list[tuple[int, int]]] = {}
        """Session -> its epochs' numbers, and the ledger's length where each began."""
        self._tombstones: dict[tuple[str, bytes], int] = {}
        """Session and turn that was cancelled before it began -> until when, store's ms."""
        self._unfit_since: dict[Ref, float] = {}
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
        if any(call.script.name == "fleet" for call in calls):
            self._read_at[process] = applied_s
            self.heartbeats.read(process, applied_s, self._now_s())

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        script = call.script.name
        if script in ("mark_replica", "register"):
            self._look_at_fleet()
        elif script == "heartbeat" and _outcome(reply) == b"done":
            ref = (_bytes(call.args[0]), _bytes(call.args[1]))
            self.heartbeats.beat(ref, int(call.args[2]), self._now_s())
        if script.startswith("read_"):
            return
        for key in call.keys:
            _, found, session_id = key.partition(":s:")
            if found:
                self._look(session_id, call, _outcome(reply))

    def forget(self) -> None:
        """The server has just lost writes: what follows is judged against what it has then."""
        self._seen.clear()
        self._cut_off.clear()
        self._tombstones.clear()
        self.heartbeats.forget()
        self._unfit_since.clear()
        self._read_at.clear()
        self._knows.clear()
        self._informed.clear()
        if self._timeline is not None:
            self._timeline.note("", "the store has lost writes")

    # -- replicas -----------------------------------------------------------------------------

    def is_unfit(self, ref: Ref) -> bool:
        """The store has it as draining, gone or replaced."""
        return ref in self._unfit_since

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
            if _unfit(fleet, ref[0]):
                self._unfit_since.setdefault(ref, self._now_s())
            previous = fleet.get(b"replaced:" + ref[0])
            if previous is not None:
                self._unfit_since.setdefault((ref[0], previous), self._now_s())

    def _chosen(self, call: ScriptCall) -> list[str]:
        at = TARGET_ARGS[call.script.name]
        ref = (_bytes(call.args[at]), _bytes(call.args[at + 1]))
        read_s, since = self._informed.get(call, 0.0), self._unfit_since.get(ref)
        if not ref[0] or since is None or since >= read_s:
            return []
        name = f"{ref[0].decode()}#{ref[1].decode()}"
        return [f"I4: to {name}, known not to take sessions since {since:.3f} s"]

    # -- sessions -----------------------------------------------------------------------------

    def _look(self, session_id: str, call: ScriptCall, outcome: bytes) -> None:
        script = call.script.name
        record = self._peek(keys.session_key(session_id))
        if not isinstance(record, dict) or b"epoch" not in record:
            self._seen.pop(session_id, None)  # purged (but for what forks need), or never opened
            return
        ledger = self._peek(keys.ledger_key(session_id)) or b""
        assert isinstance(ledger, bytes)
        before = self._seen.get(session_id)
        now = self._seen[session_id] = Seen(
            record[b"state"],
            ledger,
            (record[b"length"], record[b"digest"]),
            (int(record[b"epoch"]), record[b"nonce"]),
            (record.get(b"owner", b""), record.get(b"owner_inc", b"")),
            record.get(b"fingerprint", b""),
            _turns(record, {} if before is None else before.turns),
        )
        active = [record[b"active"]] if record.get(b"active") else []
        wrong = [] if now.running == active else [f"I3: {now.running} run, {active} is active"]
        if before is not None:
            wrong += illegal(before, now, call, outcome, self._store_ms())
            self._count(before, now, call, outcome)
            self._note_ends(session_id, before, now)
        if script in TARGET_ARGS and outcome == b"written":
            wrong += self._chosen(call)
        wrong += self._of_epoch(session_id, before, now, call)
        wrong += self._of_process(before, now, call, outcome)
        wrong += self._of_tombstones(session_id, before, now, call, outcome)
        self.violations += [f"{session_id}: after {script}: {what}" for what in wrong]
        if self._timeline is not None:
            self._tell(session_id, script, outcome, record)

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
        self._cut_off.setdefault(session_id, []).append((number, int(now.head[0])))
        if self._granted.setdefault((session_id, number), nonce) != nonce:
            return [f"P2: epoch {number} was granted before"]
        if before is None:
            return []
        process = current_process()
        if call.script.name == "take" and before.active and before.owner not in self._unfit_since:
            wrong = self.heartbeats.judge_taking(process, before.owner, self._now_s())
            return [] if wrong is None else [wrong]
        if call.script.name == "switch_migration" and before.owner not in self._unfit_since:
            self.moved(session_id, now.owner, now.ledger)
        return []

    def cut_off_at(self, session_id: str, epoch: int) -> int | None:
        """Where in the ledger a run under this epoch's number was fenced; None: it was not."""
        later = [at for number, at in self._cut_off.get(session_id, ()) if number > epoch]
        return later[0] if later else None

    def owner(self, session_id: str) -> Ref:
        """Who has the session, as far as the store says."""
        return self._seen.get(session_id, Seen()).owner

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
            self._tombstones[session_id, _bytes(call.args[0])] = until_ms
        if call.script.name == "begin" and outcome == b"begun":
            turn = _bytes(call.args[4])
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

    # -- coverage -----------------------------------------------------------------------------

    def _count(self, before: Seen, now: Seen, call: ScriptCall, outcome: bytes) -> None:
        script, seen = call.script.name, self.coverage
        event = _session_event(call, now)
        if event is not None and outcome == b"written":
            repeated = event in (SessionEvent.SUSPEND, SessionEvent.CLOSE)
            legal = SESSION.step(before.phase, event) == now.phase
            if legal and (repeated or before.epoch != now.epoch or before.phase != now.phase):
                seen[transition("session", before.phase, event)] += 1
        leaving = before.owner in self._unfit_since
        if script == "switch_migration" and outcome == b"written" and leaving and now.active:
            seen[Row.DRAIN_HANDS_OVER] += 1
        if script == "cancel" and outcome == b"unknown":
            seen[transition("turn", TurnPhase.ACCEPTED, TurnEvent.CANCEL)] += 1
        if script == "begin" and outcome in REFUSALS:
            seen[transition("turn", TurnPhase.ACCEPTED, TurnEvent.FAIL)] += 1
        if script in ("append", "begin", "resume") and outcome == b"fenced":
            seen[Row.REPLICA_HANGS] += 1
        if script == "repair" and outcome == b"appended":
            seen[Row.STORE_FAILS_OVER] += 1
        for name, turn in now.turns.items():
            known = before.turns.get(name)
            if known is None:
                if script == "begin":
                    seen[transition("turn", TurnPhase.ACCEPTED, TurnEvent.BEGIN)] += 1
                continue
            if known.status in ENDED or (known == turn and before.epoch == now.epoch):
                continue
            what = TURN_ENDS.get(turn.status)
            if what is None and turn.status == b"INTERRUPTED" and script in MOVED_ON:
                what = TurnEvent.OWNER_LOST
            elif what is None and (known.status, known.attempt) != (turn.status, turn.attempt):
                what = TurnEvent.RESUME
            if what is not None:
                seen[transition("turn", TurnPhase(known.status.decode()), what)] += 1


def _outcome(reply: Reply) -> bytes:
    first = reply[0] if isinstance(reply, list) and reply else reply
    return first if isinstance(first, bytes) else b""


def _bytes(argument: bytes | str | int) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


def _unfit(fleet: dict[bytes, bytes], name: bytes) -> bool:
    return b"1" in (fleet.get(b"draining:" + name), fleet.get(b"gone:" + name))


def _session_event(call: ScriptCall, now: Seen) -> SessionEvent | None:
    match call.script.name:
        case "place":
            return SessionEvent.PLACE
        case "take":
            return SessionEvent.TAKE if now.owner[0] else SessionEvent.UNPLACE
        case "switch_migration":
            return SessionEvent.TAKE
        case "suspend":
            asleep = now.phase is SessionPhase.SUSPENDED
            return SessionEvent.SUSPEND if asleep else SessionEvent.RESUME
        case "close":
            return SessionEvent.CLOSE
    return None


def _turns(record: dict[bytes, bytes], known: Iterable[bytes]) -> dict[bytes, SeenTurn]:
    names = [*known]
    active = record.get(b"active")
    if not names or (active and active not in names):
        # Turns come to be as the active one; that is when to look at all of them again.
        names = [name[2:-7] for name in record if name[:2] == b"t:" and name[-7:] == b":status"]
    return {name: turn for name in names if (turn := _turn(record, b"t:" + name + b":"))}


def _turn(record: dict[bytes, bytes], prefix: bytes) -> SeenTurn | None:
    status = record.get(prefix + b"status")
    if status is None:
        return None
    return SeenTurn(
        status,
        record.get(prefix + b"end_len", b""),
        record.get(prefix + b"attempt", b""),
        int(record.get(prefix + b"deadline", b"0")),
    )
