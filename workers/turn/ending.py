"""The ways in which a run ends. Exactly one of them is set, once."""

from __future__ import annotations

from dataclasses import dataclass

from sessile.v1 import types_pb2 as pb

from gateway.core.errors import NotOwner, SessileError
from statestore.records import Turn


@dataclass(frozen=True, slots=True)
class Ended:
    """The ledger says how the turn ended."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class Broken:
    """The run stopped; the turn may go on elsewhere, or the error says why not."""

    error: SessileError


@dataclass(frozen=True, slots=True)
class Redirected:
    """The turn was handed over."""

    redirect: pb.TurnRedirect


Ending = Ended | Broken | Redirected


def lost_session(ending: Ending) -> bool:
    """Whether the session belongs to somebody else now."""
    return isinstance(ending, Redirected) or (
        isinstance(ending, Broken) and isinstance(ending.error, NotOwner)
    )
