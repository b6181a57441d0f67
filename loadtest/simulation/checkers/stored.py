"""What is stored of a session and its turns, as the rules look at it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.core.machines import SessionPhase

Ref = tuple[bytes, bytes]
"""Replica id and incarnation, as stored."""

ENDED = frozenset({b"COMMITTED", b"CANCELLED", b"FAILED"})
ENDED_BY_STORE = frozenset({b"CANCELLED", b"FAILED"})
"""What a turn may be that ended without its owner: by a cancel, or past its deadline."""


@dataclass(slots=True)
class SeenTurn:
    """A turn as stored."""

    status: bytes
    end: bytes
    """Length of the ledger where it ended; empty while it is active."""
    attempt: bytes
    deadline_ms: int
    start: bytes = b"0"
    """Length of the ledger where its input begins."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(slots=True)
class Seen:
    """A session as stored."""

    state: bytes = b""
    ledger: bytes = b""
    head: tuple[bytes, bytes] = (b"", b"")
    epoch: tuple[int, bytes] = (0, b"")
    owner: Ref = (b"", b"")
    fingerprint: bytes = b""
    turns: dict[bytes, SeenTurn] = field(default_factory=dict)
    own_base: int = 0
    """Tokens of the ledger that are inherited, and in another string."""

    @property
    def running(self) -> list[bytes]:
        return [name for name, turn in self.turns.items() if not turn.ended]

    @property
    def active(self) -> bool:
        return bool(self.running)

    @property
    def phase(self) -> SessionPhase:
        if self.state != b"OPEN":
            return SessionPhase(self.state.decode())
        return SessionPhase.PLACED if self.owner[0] else SessionPhase.UNPLACED


def seen(record: dict[bytes, bytes], ledger: bytes, known: Iterable[bytes] = ()) -> Seen:
    """Of a session's hash and string. ``known``: turns that it had before."""
    return Seen(
        record[b"state"],
        ledger,
        (record[b"length"], record[b"digest"]),
        (int(record[b"epoch"]), record[b"nonce"]),
        (record.get(b"owner", b""), record.get(b"owner_inc", b"")),
        record.get(b"fingerprint", b""),
        _turns(record, known),
        int(record.get(b"own_base", b"0")),
    )


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
        record.get(prefix + b"input_start", b"0"),
    )


def as_bytes(argument: bytes | str | int) -> bytes:
    """A script's argument as the store gets it."""
    return argument if isinstance(argument, bytes) else str(argument).encode()
