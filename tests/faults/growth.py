"""What memory grows in a soak, of processes and of sessions, and how much of that is too much.

A process may grow up to a plateau (allocators, pools and caches fill); past that, only by what its
bound allows for each turn. A session may grow in the store by what a turn needs, never faster the
longer it lives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression, median

from rich.table import Table

KIB, MIB = 1 << 10, 1 << 20
WARM = 0.2
"""Share of the time after which growth is measured: caches and pools are filled by then."""
ENDS = 5
"""Samples at either end of which the median is taken."""
PLATEAU_BYTES = {"g": 6 * MIB, "w": 16 * MIB}
"""By a process's role: how far it may still have been from its plateau after the warm-up. Workers
were seen to rise by 5 to 6 MiB in 8 minutes and to stay level after 12."""
BYTES_PER_TURN = 256
"""Of a process, past its plateau."""
SESSION_BYTES_PER_TURN = 3 * KIB
"""Of a session in the store, of which 30 tokens are 120; its record of the turn is the rest."""
STORE_BYTES_PER_TURN = 6 * KIB
"""Of the whole store until retention ends: a short session's record is divided by few turns."""
KEYS_PER_SESSION = 3
"""Record, ledger, references."""
OTHER_KEYS = 32
STEADY = 1.5
"""A lasting session's later turns take at most so many times what its earlier ones took."""
LEAST_TURNS = 24
"""Of a session whose growth is judged."""


@dataclass(slots=True)
class Sample:
    """The state at one time."""

    at_s: float
    rss: dict[str, int]
    """Process -> resident bytes; a name begins with the role's letter."""
    store_bytes: int
    store_keys: int
    sessions_opened: int
    turns: int
    session_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Lasting session -> [turns, bytes of its keys in the store]."""


@dataclass(frozen=True, slots=True)
class Rise:
    """Growth of one process from the warm-up to the end."""

    first: float
    """At the very first sample."""
    warm: float
    end: float
    turns: int
    sessions: int

    @property
    def bytes(self) -> float:
        return self.end - self.warm


def rises(samples: Sequence[Sample]) -> dict[str, Rise]:
    """Of every process that lived all the time."""
    warm = [s for s in samples if s.at_s >= WARM * samples[-1].at_s]
    found: dict[str, Rise] = {}
    for name in samples[-1].rss:
        sizes = [s.rss[name] for s in warm if s.rss.get(name)]
        if len(sizes) == len(warm) >= 2:
            found[name] = Rise(
                first=next(s.rss[name] for s in samples if s.rss.get(name)),
                warm=median(sizes[:ENDS]),
                end=median(sizes[-ENDS:]),
                turns=warm[-1].turns - warm[0].turns,
                sessions=warm[-1].sessions_opened - warm[0].sessions_opened,
            )
    return found


def too_much(samples: Sequence[Sample]) -> list[str]:
    """What has grown past its bound."""
    if len(samples) < 2 * ENDS:
        return [f"growth cannot be judged: {len(samples)} samples, {2 * ENDS} are needed"]
    found = []
    for name, rise in rises(samples).items():
        plateau = PLATEAU_BYTES.get(name[0])
        allowed = (plateau or 0) + BYTES_PER_TURN * rise.turns
        if plateau is not None and rise.bytes > allowed:
            found.append(
                f"{name} grew by {rise.bytes / MIB:.1f} MiB in {rise.turns} turns,"
                f" {allowed / MIB:.1f} are allowed"
            )
    if not any(name[0] in PLATEAU_BYTES for name in rises(samples)):
        found.append("no gateway or worker lived all the time: growth cannot be judged")
    return found + _of_sessions(samples) + _of_store(samples)


def _of_sessions(samples: Sequence[Sample]) -> list[str]:
    found = []
    for session_id, points in _sessions(samples).items():
        if len(points) < 4 or points[-1][0] - points[0][0] < LEAST_TURNS:
            continue
        middle = len(points) // 2
        early, late = _slope(points[: middle + 1]), _slope(points[middle:])
        if _slope(points) > SESSION_BYTES_PER_TURN:
            found.append(
                f"{session_id} takes {_slope(points):.0f} bytes a turn in the store,"
                f" {SESSION_BYTES_PER_TURN} are allowed"
            )
        if early > 0 and late > STEADY * early + KIB:
            found.append(f"{session_id} grew by {early:.0f} bytes a turn, then by {late:.0f}")
    return found


def _of_store(samples: Sequence[Sample]) -> list[str]:
    first, last = samples[0], samples[-1]
    found = []
    allowed = STORE_BYTES_PER_TURN * (last.turns - first.turns) + MIB
    if last.store_bytes - first.store_bytes > allowed:
        found.append(f"the store grew to {last.store_bytes} bytes, {allowed} more are allowed")
    most = KEYS_PER_SESSION * last.sessions_opened + OTHER_KEYS
    if last.store_keys > most:
        found.append(f"{last.store_keys} keys of {last.sessions_opened} sessions, at most {most}")
    return found


def _sessions(samples: Sequence[Sample]) -> dict[str, list[tuple[int, int]]]:
    """Lasting session -> (turns, bytes) over time, once for each number of turns."""
    points: dict[str, dict[int, int]] = defaultdict(dict)
    for sample in samples:
        for session_id, (turns, used) in sample.session_bytes.items():
            points[session_id][turns] = used
    return {session_id: sorted(of.items()) for session_id, of in points.items()}


def _slope(points: Sequence[tuple[int, int]]) -> float:
    turns, sizes = zip(*points, strict=True)
    return float(linear_regression(turns, sizes).slope) if len({*turns}) > 1 else 0.0


# -- tables ------------------------------------------------------------------------------------


def process_table(samples: Sequence[Sample]) -> Table:
    """Growth of every process that lived all the time, after the warm-up."""
    table = Table(title="Memory of processes, MiB")
    heads = ("process", "at first", "after warm-up", "at the end", "MiB/h", "bytes/turn",
             "bytes/session")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "process" else "right")
    hours = (1 - WARM) * samples[-1].at_s / 3600
    for name, rise in rises(samples).items():
        table.add_row(
            name,
            *(f"{size / MIB:.1f}" for size in (rise.first, rise.warm, rise.end)),
            f"{rise.bytes / MIB / hours:+.1f}",
            f"{rise.bytes / max(1, rise.turns):+.0f}",
            f"{rise.bytes / max(1, rise.sessions):+.0f}",
        )
    return table


def session_table(samples: Sequence[Sample]) -> Table:
    """Growth of each lasting session in the store."""
    table = Table(title="Lasting sessions in the store")
    for head in ("session", "turns", "bytes at the end", "bytes/turn"):
        table.add_column(head, justify="left" if head == "session" else "right")
    for session_id, points in _sessions(samples).items():
        turns, used = points[-1]
        table.add_row(session_id, str(turns), str(used), f"{_slope(points):+.0f}")
    return table


def store_table(samples: Sequence[Sample]) -> Table:
    """The store over time."""
    table = Table(title="The store")
    for head in ("minute", "sessions so far", "turns", "store MiB", "keys"):
        table.add_column(head, justify="right")
    for sample in samples[:: max(1, len(samples) // 12)]:
        table.add_row(
            f"{sample.at_s / 60:.1f}",
            str(sample.sessions_opened),
            str(sample.turns),
            f"{sample.store_bytes / MIB:.2f}",
            str(sample.store_keys),
        )
    return table
