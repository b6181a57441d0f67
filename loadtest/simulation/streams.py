"""Watches what replicas send: only tokens that the ledger has at that moment (I2), whoever owns the
session by then (I4: a fenced run emits nothing of its own)."""

from __future__ import annotations

from collections.abc import Sequence

from sessile.v1 import replica_pb2 as pb
from sessile.v1.types_pb2 import TurnStream, TurnTokens

from loadtest.simulation.witness import Witness
from loadtest.simulation.world import World
from statestore import keys
from statestore.digest import pack_tokens


class StreamWatch:
    """``lossy``: what was in the ledger may have been lost from it."""

    def __init__(self, world: World, witness: Witness, *, lossy: bool) -> None:
        self._world = world
        self._witness = witness
        self._lossy = lossy

    def attach(self) -> None:
        """From now on every dispatch is watched."""
        self._world.network.on_dispatch = self._dispatched
        self._world.network.on_stream = self._sent

    def _dispatched(self, request: pb.DispatchTurnRequest, endpoint: str) -> None:
        epoch = str(request.epoch.number)[-7:]
        self._world.timeline.note(
            request.turn.session_id, f"dispatches {request.turn.turn_id} to {endpoint}", f"…{epoch}"
        )

    def _sent(self, request: pb.DispatchTurnRequest, message: TurnStream) -> None:
        if self._lossy:
            return
        for event in message.events:
            if event.HasField("tokens"):
                self._judge(request, event.tokens)

    def _judge(self, request: pb.DispatchTurnRequest, tokens: TurnTokens) -> None:
        session_id = request.turn.session_id
        record = self._world.server.peek(keys.session_key(session_id))
        ledger = self._world.server.peek(keys.ledger_key(session_id))
        if not isinstance(record, dict) or not isinstance(ledger, bytes) or b"epoch" not in record:
            return  # it was purged
        end = tokens.position + len(tokens.token_ids)
        cut_off_at = self._witness.cut_off_at(session_id, request.epoch.number)
        runs = self._witness.runs(session_id, request.turn.turn_id)
        if runs and cut_off_at is not None and end > cut_off_at:
            self._world.violations.append(
                f"{session_id}: I4: a run that was fenced at {cut_off_at} emits up to {end}"
            )
        first = 4 * (tokens.position - int(record[b"own_base"]))
        if first < 0 or _holds(ledger, first, tokens.token_ids):
            return
        fenced = int(record[b"epoch"]) != request.epoch.number
        what = "I4: a fenced run emits" if fenced else "I2: tokens are sent"
        self._world.violations.append(
            f"{session_id}: {what} what the ledger does not have at {tokens.position}"
        )


def _holds(ledger: bytes, first: int, tokens: Sequence[int]) -> bool:
    return ledger[first : first + 4 * len(tokens)] == pack_tokens(tokens)
