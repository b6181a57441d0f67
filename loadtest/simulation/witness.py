"""Watches every write to the store, and notes what no sequence of writes may do.

* I1: a ledger only grows, under the epoch of its owner; epochs only grow, a number is granted once.
* I3: one turn of a session runs at most, and it is the active one; a turn that has ended stays as
  it ended.
* I4: nobody places a session on a replica, takes one to it or begins to move one there after
  reading in the store that it drains, is gone or was replaced.
* I7: when each turn was due and when it ended.
* P2: a closed session is never open again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gateway.core.machines import SESSION, SessionEvent, SessionPhase, TurnEvent, TurnPhase
from loadtest.simulation.coverage import Row, transition
from loadtest.simulation.loop import Process
from loadtest.simulation.timeline import Timeline
from statestore import keys
from statestore.executor import Reply, ScriptCall

ENDED = frozenset({b"COMMITTED", b"CANCELLED", b"FAILED"})
Stored = bytes | dict[bytes, bytes] | object | None
Ref = tuple[bytes, bytes]
"""Replica id and incarnation, as stored."""

TARGET_ARGS = {"place": 2, "take": 2, "begin_migration": 3}
"""Scripts that choose a replica -> where its id is among their arguments."""
MOVED_ON = frozenset({"take", "switch_migration"})
TURN_ENDS = {
    b"COMMITTED": TurnEvent.COMMIT,
    b"CANCELLED": TurnEvent.CANCEL,
    b"FAILED": TurnEvent.FAIL,
}
REFUSALS = frozenset({b"busy", b"limit", b"refused", b"tombstoned"})


@dataclass(slots=True)
class _Turn:
    status: bytes
    end: bytes
    """Length of the ledger where it ended; empty while it is active."""
    attempt: bytes
    deadline_ms: int


@dataclass(slots=True)
class _Seen:
    state: bytes = b""
    ledger: bytes = b""
    epoch: tuple[int, bytes] = (0, b"")
    owner: Ref = (b"", b"")
    turns: dict[bytes, _Turn] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return any(turn.status not in ENDED for turn in self.turns.values())

    @property
    def phase(self) -> SessionPhase:
        if self.state != b"OPEN":
            return SessionPhase(self.state.decode())
        return SessionPhase.PLACED if self.owner[0] else SessionPhase.UNPLACED


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """When a turn was due and when it ended, in true virtual seconds."""

    session_id: str
    turn_id: str
    deadline_s: float
    ended_s: float


class Witness:
    """``peek`` reads a key of the store, ``now_s`` is the virtual time and ``start_us`` the store's
    clock at its zero. ``violations`` are found while the world runs and must be looked at in the
    end: raising inside a script would only look like a bug of its caller."""

    def __init__(
        self,
        peek: Callable[[str], Stored],
        timeline: Timeline | None = None,
        now_s: Callable[[], float] = lambda: 0.0,
        start_us: int = 0,
        coverage: Counter[str] | None = None,
    ) -> None:
        self.violations: list[str] = []
        self.ended: list[TurnTimes] = []
        self.coverage: Counter[str] = Counter() if coverage is None else coverage
        self._peek = peek
        self._timeline = timeline
        self._now_s = now_s
        self._start_us = start_us
        self._seen: dict[str, _Seen] = {}
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

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        script = call.script.name
        if script in ("mark_replica", "register"):
            self._look_at_fleet()
        if script.startswith("read_"):
            return
        for key in call.keys:
            _, found, session_id = key.partition(":s:")
            if found:
                self._look(session_id, call, _outcome(reply))

    def forget(self) -> None:
        """The server has just lost writes: what follows is judged against what it has then."""
        self._seen.clear()
        self._unfit_since.clear()
        self._read_at.clear()
        self._knows.clear()
        self._informed.clear()
        if self._timeline is not None:
            self._timeline.note("", "the store has lost writes")

    # -- replicas -----------------------------------------------------------------------------

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
        now = self._seen[session_id] = _Seen(
            record[b"state"],
            ledger,
            (int(record[b"epoch"]), record[b"nonce"]),
            (record.get(b"owner", b""), record.get(b"owner_inc", b"")),
            _turns(record, {} if before is None else before.turns),
        )
        running = [name for name, turn in now.turns.items() if turn.status not in ENDED]
        active = [record[b"active"]] if record.get(b"active") else []
        wrong = [] if running == active else [f"I3: {running} run, {active} is active"]
        if before is not None:
            wrong += _illegal(before, now, call)
            self._count(before, now, call, outcome)
            self._note_ends(session_id, before, now)
        if script in TARGET_ARGS and outcome == b"written":
            wrong += self._chosen(call)
        self.violations += [f"{session_id}: after {script}: {what}" for what in wrong]
        if self._timeline is not None:
            self._tell(session_id, script, outcome, record)

    def _note_ends(self, session_id: str, before: _Seen, now: _Seen) -> None:
        for name, turn in now.turns.items():
            known = before.turns.get(name)
            if known is not None and known.status not in ENDED and turn.status in ENDED:
                due_s = turn.deadline_ms / 1000 - self._start_us / 1_000_000
                self.ended.append(TurnTimes(session_id, name.decode(), due_s, self._now_s()))

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

    def _count(self, before: _Seen, now: _Seen, call: ScriptCall, outcome: bytes) -> None:
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


def _session_event(call: ScriptCall, now: _Seen) -> SessionEvent | None:
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
    if before.phase is SessionPhase.CLOSED and now.phase is not before.phase:
        wrong.append(f"P2: a closed session became {now.phase}")
    for name, turn in before.turns.items():
        if turn.status in ENDED and now.turns.get(name) != turn:
            wrong.append(f"I3: {name!r} was {turn}, is {now.turns.get(name)}")
    return wrong


def _turns(record: dict[bytes, bytes], known: Iterable[bytes]) -> dict[bytes, _Turn]:
    names = [*known]
    active = record.get(b"active")
    if not names or (active and active not in names):
        # Turns come to be as the active one; that is when to look at all of them again.
        names = [name[2:-7] for name in record if name[:2] == b"t:" and name[-7:] == b":status"]
    return {name: turn for name in names if (turn := _turn(record, b"t:" + name + b":"))}


def _turn(record: dict[bytes, bytes], prefix: bytes) -> _Turn | None:
    status = record.get(prefix + b"status")
    if status is None:
        return None
    return _Turn(
        status,
        record.get(prefix + b"end_len", b""),
        record.get(prefix + b"attempt", b""),
        int(record.get(prefix + b"deadline", b"0")),
    )
