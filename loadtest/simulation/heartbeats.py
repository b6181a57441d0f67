"""Knows from the store alone when each replica beat, and when each gateway read the fleet; judges
by that who was taken for dead (P9) and from whom sessions were taken (P10)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.simulation.loop import Process
from loadtest.simulation.rules import Ref

BEATS_KEPT = 32
OUTAGE_S = 1.0
"""Answers of the store further apart than this are an outage, as gateways are configured."""
LEASE_S = 1.0
"""Half of the silence after which a replica counts as down."""
REGULAR_S = 4.0
"""A replica that beat all the while is not stale for anybody, whatever happened before."""
LONGEST_GAP_S = 0.9


@dataclass(slots=True)
class _Readings:
    """Of one gateway: since when the store answered it without an outage, when it got the last
    answer, and when that was made."""

    since_s: float
    last_s: float
    made_s: float


class Heartbeats:
    """Times are true virtual seconds. ``lives`` tells whether a replica's process exists and is not
    stopped."""

    def __init__(self, lives: Callable[[Ref], bool]) -> None:
        self._lives = lives
        self._counts: dict[Ref, int] = {}
        self._beats: dict[Ref, deque[float]] = {}
        self._readings: dict[Process, _Readings] = {}
        self._reset: set[Ref] = set()
        self._went_back = False

    def beat(self, ref: Ref, count: int, now_s: float) -> None:
        """The store has taken a heartbeat, perhaps once more."""
        if count > self._counts.get(ref, 0):
            self._counts[ref] = count
            self._beats.setdefault(ref, deque(maxlen=BEATS_KEPT)).append(now_s)

    def read(self, gateway: Process, made_s: float, now_s: float) -> None:
        """A gateway got the answer to its question for the fleet."""
        known = self._readings.get(gateway)
        if known is None or now_s - known.last_s > OUTAGE_S:
            known = self._readings[gateway] = _Readings(now_s, now_s, made_s)
        known.last_s, known.made_s = now_s, made_s

    def forget(self) -> None:
        """The store has lost writes, and counters went back: nothing is judged any more."""
        self._went_back = True

    def was_reset(self, ref: Ref) -> None:
        """A connection of this process was reset: gateways may take it for dead."""
        self._reset.add(ref)

    def judge_down(self, gateway: Process, ref: Ref) -> str | None:
        """A gateway takes this replica for down, because of its silence."""
        readings = self._readings.get(gateway)
        if readings is None or _own_time(gateway) or self._went_back:
            return None
        beats = (at_s for at_s in self._beats.get(ref, ()) if at_s <= readings.made_s)
        last_beat = max(beats, default=0.0)
        silent_s = readings.last_s - max(last_beat, readings.since_s)
        if silent_s >= LEASE_S:
            return None
        return f"P9: {gateway.name} has {_name(ref)} for down after {silent_s:.2f} s of silence"

    def judge_taking(self, gateway: Process | None, owner: Ref, now_s: float) -> str | None:
        """A session was taken from this owner in mid-turn."""
        if gateway is None or _own_time(gateway) or self._went_back:
            return None
        if owner in self._reset or not self._lives(owner):
            return None
        since_s = now_s - REGULAR_S
        beats = [at_s for at_s in self._beats.get(owner, ()) if at_s >= since_s]
        times = [since_s, *beats, now_s]
        if any(later - one > LONGEST_GAP_S for one, later in itertools.pairwise(times)):
            return None
        return f"P10: {gateway.name} took it from {_name(owner)}, which beats"


def _own_time(process: Process) -> bool:
    """Its clock is, or was, another than the true one."""
    return process.rate != 1.0 or process.ahead_s != 0.0


def _name(ref: Ref) -> str:
    return f"{ref[0].decode()}#{ref[1].decode()}"
