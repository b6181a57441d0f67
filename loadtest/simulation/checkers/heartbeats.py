"""Knows from the store alone when each replica beat, and when each gateway read the fleet; judges
by that who was taken for dead (P9) and from whom sessions were taken (P10)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.loop import Process

BEATS_KEPT = 32
OUTAGE_S = 1.0
"""Answers of the store further apart than this are an outage, as gateways are configured."""
LEASE_S = 1.0
"""Half of the silence after which a replica counts as down."""
REGULAR_S = 4.0
"""A replica that beat all the while is not stale for anybody, whatever happened before."""
LONGEST_GAP_S = 0.9
ACTS_S = 4.0
"""A gateway that hears of a reset connection, or judges by a clock that was wrong, acts on it
within this time, unless the store does not answer it."""


@dataclass(slots=True)
class _Readings:
    """Of one gateway: since when the store answered it without an outage, when it got the last
    answer, and when that was made; how its clock goes, and since when."""

    since_s: float
    last_s: float
    made_s: float
    clock: tuple[float, float]
    clock_since_s: float


class Heartbeats:
    """Times are true virtual seconds. ``lives`` tells whether a replica's process exists and is not
    stopped."""

    def __init__(self, lives: Callable[[Ref], bool]) -> None:
        self._lives = lives
        self._counts: dict[Ref, int] = {}
        self._beats: dict[Ref, deque[tuple[float, int]]] = {}
        self._readings: dict[Process, _Readings] = {}
        self._reset_s: dict[Ref, float] = {}
        self._astray: dict[str, None] = {}
        """Sessions that the store gave back to an earlier owner when it lost writes."""
        self._lost_s = -REGULAR_S

    def beat(self, ref: Ref, count: int, now_s: float) -> None:
        """The store has taken a heartbeat, perhaps once more. One that does not go past those
        before tells nobody anything: a repeat, or the count after a loss of writes."""
        if count > self._counts.get(ref, 0):
            self._counts[ref] = count
            self._beats.setdefault(ref, deque(maxlen=BEATS_KEPT)).append((now_s, count))

    def lost(self, counts: Mapping[Ref, int], now_s: float) -> None:
        """The store has lost writes and has these counts now: perhaps nobody saw what went past
        them."""
        self._lost_s = now_s
        for ref, beats in self._beats.items():
            seen = [beat for beat in beats if beat[1] <= counts.get(ref, 0)]
            self._beats[ref] = deque(seen, maxlen=BEATS_KEPT)

    def read(self, gateway: Process, made_s: float, now_s: float) -> None:
        """A gateway got the answer to its question for the fleet."""
        known, clock = self._readings.get(gateway), _clock(gateway)
        if known is None:
            since_s = 0.0 if clock == TRUE_CLOCK else now_s
            known = _Readings(now_s, now_s, made_s, clock, since_s)
            self._readings[gateway] = known
        elif now_s - known.last_s > OUTAGE_S:
            known.since_s = now_s
        if clock != known.clock:
            known.clock, known.clock_since_s = clock, now_s
        known.last_s, known.made_s = now_s, made_s

    def went_astray(self, session_id: str) -> None:
        """The store has lost that the session was given to its present owner. Until it is given to
        somebody again, gateways may find that the stored one does not own it."""
        self._astray[session_id] = None

    def has_owner(self, session_id: str) -> None:
        """The session has a new epoch."""
        self._astray.pop(session_id, None)

    def was_reset(self, ref: Ref, now_s: float) -> None:
        """A connection of this process was reset: gateways may take it for dead."""
        self._reset_s[ref] = now_s

    def judge_down(self, gateway: Process, ref: Ref, now_s: float) -> str | None:
        """A gateway takes this replica for down, because of its silence."""
        readings = self._readings.get(gateway)
        if readings is None or not _judges_rightly(gateway, readings, now_s):
            return None
        beats = (at_s for at_s, _ in self._beats.get(ref, ()) if at_s <= readings.made_s)
        last_beat = max(beats, default=0.0)
        silent_s = readings.last_s - max(last_beat, readings.since_s)
        if silent_s >= LEASE_S:
            return None
        return f"P9: {gateway.name} has {_name(ref)} for down after {silent_s:.2f} s of silence"

    def judge_taking(
        self, gateway: Process | None, session_id: str, owner: Ref, now_s: float
    ) -> str | None:
        """A session was taken from this owner in mid-turn."""
        readings = None if gateway is None else self._readings.get(gateway)
        if gateway is None or readings is None or session_id in self._astray:
            return None
        if not _judges_rightly(gateway, readings, now_s):
            return None
        if self._may_be_acted_on(self._reset_s.get(owner), readings, now_s):
            return None
        if not self.beats_regularly(owner, now_s):
            return None
        return f"P10: {gateway.name} took it from {_name(owner)}, which beats"

    def beats_regularly(self, ref: Ref, now_s: float) -> bool:
        """Whether its process lives, and the store took its heartbeats without a gap for so long
        that nobody who reads them may doubt it."""
        since_s = now_s - REGULAR_S
        beats = [at_s for at_s, _ in self._beats.get(ref, ()) if at_s >= since_s]
        gaps = itertools.pairwise([since_s, *beats, now_s])
        return self._lives(ref) and all(later - one <= LONGEST_GAP_S for one, later in gaps)

    def surely_up(self, gateway: Process, ref: Ref, now_s: float) -> bool:
        """This gateway must take the replica for alive."""
        readings = self._readings.get(gateway)
        return (
            readings is not None
            and self._has_long_read(gateway, readings, now_s)
            and not self._may_be_acted_on(self._reset_s.get(ref), readings, now_s)
            and self.beats_regularly(ref, now_s)
        )

    def surely_down(self, gateway: Process, ref: Ref, now_s: float) -> bool:
        """This gateway must take the replica for dead: it is, or is stopped, and has not beaten for
        twice the silence after which it counts as down."""
        readings = self._readings.get(gateway)
        if readings is None or self._lives(ref):
            return False
        last_s = max((at_s for at_s, _ in self._beats.get(ref, ())), default=0.0)
        return self._has_long_read(gateway, readings, now_s) and now_s - last_s >= REGULAR_S

    def _has_long_read(self, gateway: Process, readings: _Readings, now_s: float) -> bool:
        """It has read the fleet without an outage for as long as it takes to know it."""
        since_s = max(readings.since_s, self._lost_s)
        steady = _judges_rightly(gateway, readings, now_s) and now_s - since_s >= REGULAR_S
        return steady and now_s - readings.last_s <= OUTAGE_S

    def _may_be_acted_on(self, happened_s: float | None, readings: _Readings, now_s: float) -> bool:
        return happened_s is not None and now_s - max(happened_s, readings.since_s) < ACTS_S


TRUE_CLOCK = 1.0, 0.0


def _clock(process: Process) -> tuple[float, float]:
    return process.rate, process.ahead_s


def _judges_rightly(gateway: Process, readings: _Readings, now_s: float) -> bool:
    """Its clock goes at the true one's rate, and has gone so long enough for what it measured
    before to play no part any more. How far ahead it is does not matter."""
    steady = _clock(gateway) == readings.clock and gateway.rate == 1.0
    return steady and (
        readings.clock_since_s == 0.0
        or now_s - max(readings.clock_since_s, readings.since_s) >= ACTS_S
    )


def _name(ref: Ref) -> str:
    return f"{ref[0].decode()}#{ref[1].decode()}"
