"""Counts, from the records that scripts leave, what sessions and turns go through, and what becomes
of them when a replica or the store fails.

A row of the failure table is counted only if what it names has happened: the process that ran the
turn is dead, the one that writes late was stopped when it was replaced, the tokens that are put
back are those that the store had lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from gateway.core.machines import SESSION, SessionEvent, SessionPhase, TurnEvent, TurnPhase
from loadtest.simulation.checkers.stored import ENDED, Ref, Seen
from loadtest.simulation.coverage import Row, transition
from loadtest.simulation.loop import Process
from statestore.executor import ScriptCall

MOVED_ON = frozenset({"take", "switch_migration"})
TURN_ENDS = {
    b"COMMITTED": TurnEvent.COMMIT,
    b"CANCELLED": TurnEvent.CANCEL,
    b"FAILED": TurnEvent.FAIL,
}
REFUSALS = frozenset({b"busy", b"limit", b"refused", b"tombstoned"})
OWN_WRITES = frozenset({"append", "begin", "resume"})


class Tally:
    """``seen`` are the counts. ``has_died`` tells whether the process that is, or was, a replica
    will not run again; ``whose`` which replica a process is; ``now_s`` is the true time."""

    def __init__(
        self,
        seen: Counter[str],
        has_died: Callable[[Ref], bool],
        whose: Callable[[Process], Ref | None],
        now_s: Callable[[], float],
    ) -> None:
        self.seen = seen
        self._has_died = has_died
        self._whose = whose
        self._now_s = now_s
        self._orphaned: dict[str, tuple[bytes, Ref]] = {}
        """Session -> its running turn, and who died of it."""
        self._taken_s: dict[tuple[str, Ref], float] = {}
        """Session and former owner -> when it lost it."""
        self._lost: dict[str, Seen] = {}
        """Session of which the store has lost tokens -> as it was before."""
        self._over_a_restart: dict[str, bytes] = {}
        """Session -> the turn that ran when the store ended last."""

    def count(
        self,
        session_id: str,
        before: Seen,
        now: Seen,
        call: ScriptCall,
        outcome: bytes,
        writer: Process | None,
        *,
        leaving: bool,
    ) -> None:
        """A process (None: none that is known) had a script do this to a session, whose owner was
        ``leaving``: it drains."""
        script = call.script.name
        self._session(before, now, call, outcome)
        self._turns(before, now, script, outcome)
        self._owner_lost(session_id, before, now, script)
        if script == "append" and outcome == b"appended":
            self._went_on(session_id, before)
        self._continued(session_id, now, script, outcome)
        if script == "switch_migration" and outcome == b"written" and leaving and now.active:
            self.seen[Row.DRAIN_HANDS_OVER] += 1
        if script in OWN_WRITES and outcome == b"fenced" and writer is not None:
            self._late_write(session_id, now, writer)
        if script == "repair" and outcome == b"appended":
            self._repaired(session_id, before, now)

    def lost(self, sessions: Mapping[str, Seen]) -> None:
        """The store has lost writes; so the sessions were before."""
        self._lost |= sessions
        self._orphaned.clear()
        self._taken_s.clear()

    def restarted(self, sessions: Mapping[str, Seen]) -> None:
        """The store ends, to come back with all its data."""
        self._over_a_restart = {name: it.running[0] for name, it in sessions.items() if it.running}

    # -- rows ---------------------------------------------------------------------------------

    def _owner_lost(self, session_id: str, before: Seen, now: Seen, script: str) -> None:
        if before.epoch == now.epoch or not before.owner[0] or before.owner == now.owner:
            return
        self._taken_s[session_id, before.owner] = self._now_s()
        if script == "take" and before.running and self._has_died(before.owner):
            self._orphaned[session_id] = before.running[0], before.owner

    def _continued(self, session_id: str, now: Seen, script: str, outcome: bytes) -> None:
        turn, dead = self._orphaned.get(session_id, (b"", now.owner))
        if script == "append" and outcome == b"appended" and dead != now.owner:
            self.seen[Row.REPLICA_DIES] += 1
            del self._orphaned[session_id]
        elif turn and turn not in now.running:
            del self._orphaned[session_id]  # it was cancelled, or its time was over

    def _went_on(self, session_id: str, before: Seen) -> None:
        if self._over_a_restart.get(session_id) in before.running:
            self.seen[Row.STORE_RESTARTS] += 1
            self._over_a_restart.clear()  # once for a restart

    def _late_write(self, session_id: str, now: Seen, writer: Process) -> None:
        ref = self._whose(writer)
        taken_s = None if ref is None else self._taken_s.get((session_id, ref))
        if taken_s is not None and ref != now.owner and writer.was_stopped_at(taken_s):
            self.seen[Row.REPLICA_HANGS] += 1

    def _repaired(self, session_id: str, before: Seen, now: Seen) -> None:
        lost = self._lost.get(session_id)
        if lost is not None and len(before.ledger) < len(lost.ledger) <= len(now.ledger):
            if now.ledger.startswith(lost.ledger) and now.owner == lost.owner:
                self.seen[Row.STORE_FAILS_OVER] += 1
            del self._lost[session_id]

    # -- transitions --------------------------------------------------------------------------

    def _session(self, before: Seen, now: Seen, call: ScriptCall, outcome: bytes) -> None:
        event = _session_event(call, now)
        if event is None or outcome != b"written":
            return
        repeated = event in (SessionEvent.SUSPEND, SessionEvent.CLOSE)
        legal = SESSION.step(before.phase, event) == now.phase
        if legal and (repeated or before.epoch != now.epoch or before.phase != now.phase):
            self.seen[transition("session", before.phase, event)] += 1

    def _turns(self, before: Seen, now: Seen, script: str, outcome: bytes) -> None:
        if script == "cancel" and outcome == b"unknown":
            self._turn(TurnPhase.ACCEPTED, TurnEvent.CANCEL)
        if script == "begin" and outcome in REFUSALS:
            self._turn(TurnPhase.ACCEPTED, TurnEvent.FAIL)
        for name, turn in now.turns.items():
            known = before.turns.get(name)
            if known is None:
                if script == "begin":
                    self._turn(TurnPhase.ACCEPTED, TurnEvent.BEGIN)
                continue
            if known.status in ENDED or (known == turn and before.epoch == now.epoch):
                continue
            what = TURN_ENDS.get(turn.status)
            if what is None and turn.status == b"INTERRUPTED" and script in MOVED_ON:
                what = TurnEvent.OWNER_LOST
            elif what is None and script == "resume" and known.attempt != turn.attempt:
                what = TurnEvent.RESUME
            if what is not None:
                self._turn(TurnPhase(known.status.decode()), what)

    def _turn(self, phase: TurnPhase, event: TurnEvent) -> None:
        self.seen[transition("turn", phase, event)] += 1


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
