"""What the SDK hands out is judged as what a plain client hears."""

from __future__ import annotations

import pytest
import sessile
from sessile.events import TurnFold
from sessile.v1 import types_pb2 as pb

from gateway.core import errors
from loadtest.simulation.clients.agents import LOSS
from tests.faults.agents import Heard
from tests.faults.sdk_agents import as_told, on_the_wire

REF = pb.ReplicaRef(replica_id="w1", incarnation=7)
OTHER = pb.ReplicaRef(replica_id="w2", incarnation=9)
STREAM = [
    pb.TurnEvent(
        accepted=pb.TurnAccepted(
            turn_id="t0",
            turn_index=3,
            output_start=pb.Position(length=10, digest=b"a" * 16),
            seed=5,
            attempt=1,
            replica=REF,
        )
    ),
    pb.TurnEvent(tokens=pb.TurnTokens(position=10, token_ids=[1, 2], digest=b"b" * 16, text="é")),
    pb.TurnEvent(moved=pb.TurnMoved(to=OTHER, reason=pb.TurnMoved.REASON_FAILOVER, attempt=2)),
    pb.TurnEvent(
        tokens=pb.TurnTokens(position=12, token_ids=[3], digest=b"c" * 16, text="x", text_offset=1)
    ),
    pb.TurnEvent(
        finished=pb.TurnFinished(
            status=pb.TURN_STATUS_COMMITTED,
            reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(input_tokens=10, cached_tokens=4, output_tokens=3),
            end=pb.Position(length=13, digest=b"c" * 16),
            text="y",
            text_offset=2,
            text_end=3,
        )
    ),
]


def nothing_heard() -> Heard:
    return Heard("ses_a", "t0", pb.RunTurnRequest())


@pytest.mark.anyio
async def test_events_of_the_sdk_say_what_the_stream_said() -> None:
    plain, by_sdk, fold = nothing_heard(), nothing_heard(), TurnFold(None)
    for event in STREAM:
        plain.hear(event)
        shown = fold.take(event)
        assert shown is not None
        wire = on_the_wire(shown, by_sdk)
        assert wire is not None
        by_sdk.hear(wire)
    assert plain.violations == by_sdk.violations == []
    assert (plain.tokens, plain.digests, plain.text) == (
        by_sdk.tokens,
        by_sdk.digests,
        by_sdk.text,
    )
    assert (plain.start, plain.index, plain.moves, plain.replicas) == (
        by_sdk.start,
        by_sdk.index,
        by_sdk.moves,
        by_sdk.replicas,
    )
    assert plain.finished == by_sdk.finished


def test_errors_of_the_sdk_are_judged_as_the_gateways_of_the_same_name() -> None:
    heard = nothing_heard()
    for cls in (sessile.DataLoss, sessile.StaleClient, sessile.TurnInProgress):
        error = as_told(cls("gone", metadata={"turn_id": "t1"}), heard)
        assert isinstance(error, LOSS)
        assert error.metadata == {"turn_id": "t1"}
    assert isinstance(as_told(sessile.NotFound("gone"), heard), errors.NotFound)
    assert heard.violations == []


def test_an_accepted_turn_that_is_not_found_is_a_loss() -> None:
    heard = nothing_heard()
    heard.start = pb.Position(length=10)
    assert isinstance(as_told(sessile.NotFound("gone"), heard), errors.DataLoss)


def test_a_stream_that_the_sdk_refuses_is_a_violation() -> None:
    heard = nothing_heard()
    as_told(sessile.ProtocolError("gap"), heard)
    assert heard.violations == ["I2: the SDK says ProtocolError: gap"]
