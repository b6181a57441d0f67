"""What runs may take for a session's ledger (I2, I4).

A store that loses writes leaves more than one ledger behind: what it had is gone from it, though
who wrote it was told that it is in. Until such a process hears that it is fenced it may send what
it was told, and from then on only what is in the store. The same holds where an owner takes back
its session after a loss and gives up what another has written meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.simulation.checkers.repairs import KEEP
from loadtest.simulation.checkers.stored import Seen, as_bytes
from loadtest.simulation.loop import Process
from statestore.executor import ScriptCall


@dataclass(frozen=True, slots=True)
class Life:
    """The ledger of a session while the store lost none of it."""

    ledger: bytes
    own_base: int
    cut_offs: tuple[tuple[int, int], ...]
    """Its epochs' numbers, and the ledger's length where each began."""
    ended_s: float | None = None
    """When it was lost; None: it is the ledger now."""

    def cut_off_at(self, epoch: int) -> int | None:
        """Where in the ledger a run under this epoch's number was fenced; None: it was not."""
        later = [at for number, at in self.cut_offs if number > epoch]
        return later[0] if later else None

    def holds(self, position: int, packed: bytes) -> bool:
        """Whether these tokens are there. What is inherited is in another string, and not asked
        for: a turn's output is in its own session's."""
        first = 4 * (position - self.own_base)
        return first < 0 or self.ledger[first : first + len(packed)] == packed


class Lives:
    """Times are true virtual seconds."""

    def __init__(self) -> None:
        self._cut_offs: dict[str, list[tuple[int, int]]] = {}
        self._former: dict[str, list[Life]] = {}
        self._fencing: dict[ScriptCall, None] = {}
        """Calls that were last answered so."""
        self._told: dict[tuple[Process, str, int], float] = {}
        """Process, session and epoch -> when it heard that it is fenced."""

    # -- what happens -------------------------------------------------------------------------

    def began(
        self, session_id: str, before: Seen | None, now: Seen, call: ScriptCall, now_s: float
    ) -> None:
        """The session has a new epoch."""
        at = int(now.head[0])
        if call.script.name == "repair" and before is not None:
            at = int(call.args[KEEP])
            if not now.ledger.startswith(before.ledger):
                self._end(session_id, before, now_s)
        self._cut_offs.setdefault(session_id, []).append((now.epoch[0], at))

    def lost(self, session_id: str, before: Seen, now: Seen | None, now_s: float) -> None:
        """The server lost writes: of this session it has ``now`` what it had earlier."""
        if now == before:
            return
        self._end(session_id, before, now_s)
        number = -1 if now is None else now.epoch[0]
        kept = [(n, at) for n, at in self._cut_offs.get(session_id, ()) if n <= number]
        self._cut_offs[session_id] = kept

    def replied(self, call: ScriptCall, outcome: bytes) -> None:
        """The server has run a call, perhaps once more; its answer is on its way."""
        if outcome == b"fenced":
            self._fencing[call] = None
        else:
            self._fencing.pop(call, None)

    def answered(self, process: Process, calls: Sequence[ScriptCall], now_s: float) -> None:
        """A process gets its answers."""
        for call in calls:
            if call in self._fencing:
                session_id = as_bytes(call.keys[0]).decode().partition(":s:")[2]
                self._told[process, session_id, int(call.args[0])] = now_s

    # -- what is judged by it -----------------------------------------------------------------

    def now(self, session_id: str, seen: Seen) -> Life:
        """The ledger as it is."""
        return Life(seen.ledger, seen.own_base, tuple(self._cut_offs.get(session_id, ())))

    def former(self, session_id: str, process: Process | None, epoch: int) -> list[Life]:
        """What was lost and may be sent by a run of this process under this epoch's number."""
        told_s = -1.0 if process is None else self._told.get((process, session_id, epoch), -1.0)
        lives = self._former.get(session_id, ())
        return [it for it in lives if it.ended_s is not None and it.ended_s >= told_s]

    def any_former(self, session_id: str) -> bool:
        """Whether there ever was another ledger of the session than the one that it has."""
        return session_id in self._former

    def _end(self, session_id: str, seen: Seen, now_s: float) -> None:
        cut_offs = tuple(self._cut_offs.get(session_id, ()))
        life = Life(seen.ledger, seen.own_base, cut_offs, now_s)
        self._former.setdefault(session_id, []).append(life)
