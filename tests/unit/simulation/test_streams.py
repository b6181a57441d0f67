"""What replicas may send: tokens that the ledger has, or had when the sender last heard of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from sessile.v1 import replica_pb2 as pb
from sessile.v1.types_pb2 import TurnEvent, TurnStream, TurnTokens

from loadtest.simulation.checkers.lives import Life
from loadtest.simulation.checkers.streams import StreamWatch
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.world import World
from statestore.digest import pack_tokens

NOW = Life(pack_tokens([10, 11, 12]), 0, ((5, 0),))
FENCED = Life(pack_tokens([10, 11, 12]), 0, ((5, 0), (6, 2)))
FORMER = Life(pack_tokens([10, 11, 12, 13]), 0, ((5, 0),), 3.0)
FORMER_FENCED = Life(pack_tokens([10, 11, 12, 13]), 0, ((5, 0), (6, 2)), 3.0)


def complaints(lives: list[Life], position: int, tokens: list[int], *, runs: bool) -> list[str]:
    """Of a message that a run under epoch 5 sends."""
    world = SimpleNamespace(network=SimpleNamespace(), violations=[])
    witness = SimpleNamespace(lives=lambda *_: lives, runs=lambda *_: runs)
    StreamWatch(cast(World, world), cast(Witness, witness)).attach()
    request = pb.DispatchTurnRequest()
    request.turn.session_id, request.turn.turn_id, request.epoch.number = "ses_a", "t0", 5
    event = TurnEvent(tokens=TurnTokens(position=position, token_ids=tokens))
    world.network.on_stream(request, TurnStream(events=[event]))
    return [str(what) for what in world.violations]


@pytest.mark.parametrize(
    ("lives", "position", "tokens", "runs"),
    [
        ([NOW], 1, [11, 12], True),
        ([FENCED], 0, [10, 11], True),
        ([FENCED], 1, [11, 12], False),
        ([NOW, FORMER], 2, [12, 13], True),
        ([FENCED, FORMER], 2, [12, 13], True),
        ([], 0, [99], True),
    ],
    ids=["as it is", "before it was fenced", "ended", "lost", "lost and fenced", "purged"],
)
def test_what_the_ledger_has_may_be_sent(
    lives: list[Life], position: int, tokens: list[int], runs: bool
) -> None:
    assert complaints(lives, position, tokens, runs=runs) == []


@pytest.mark.parametrize(
    ("rule", "lives", "position", "tokens"),
    [
        ("I2", [NOW], 2, [12, 13]),
        ("I2", [NOW], 1, [10]),
        ("I2", [NOW, FORMER], 3, [14]),
        ("I4", [FENCED], 2, [13]),
        ("I4", [FENCED], 1, [11, 12]),
        ("I4", [FENCED, FORMER_FENCED], 2, [12, 13]),
    ],
    ids=[
        "not journalled",
        "others",
        "never there",
        "of its own after it was fenced",
        "of its heir",
        "fenced before the loss",
    ],
)
def test_what_it_has_not_is_told(
    rule: str, lives: list[Life], position: int, tokens: list[int]
) -> None:
    (what,) = complaints(lives, position, tokens, runs=True)
    assert what.startswith(f"ses_a: {rule}: ")
