"""Watches what replicas send: only tokens that the ledger has at that moment (I2), whoever owns the
session by then (I4: a fenced run emits nothing of its own). Where the store has lost what it had,
see :mod:`loadtest.simulation.checkers.lives`."""

from __future__ import annotations

from sessile.v1 import replica_pb2 as pb
from sessile.v1.types_pb2 import TurnStream, TurnTokens

from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.loop import current_process
from loadtest.simulation.world import World
from statestore.digest import pack_tokens


class StreamWatch:
    """Complains to the world."""

    def __init__(self, world: World, witness: Witness) -> None:
        self._world = world
        self._witness = witness

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
        for event in message.events:
            if event.HasField("tokens"):
                wrong = self._judge(request, event.tokens)
                if wrong is not None:
                    self._world.violations.append(f"{request.turn.session_id}: {wrong}")

    def _judge(self, request: pb.DispatchTurnRequest, tokens: TurnTokens) -> str | None:
        session_id, epoch = request.turn.session_id, request.epoch.number
        lives = self._witness.lives(session_id, current_process(), epoch)
        if not lives:
            return None  # it was purged
        end, packed = tokens.position + len(tokens.token_ids), pack_tokens(tokens.token_ids)
        held = [life for life in lives if life.holds(tokens.position, packed)]
        cuts = [life.cut_off_at(epoch) for life in held]
        runs = self._witness.runs(session_id, request.turn.turn_id)
        if runs and held and all(cut is not None and end > cut for cut in cuts):
            return f"I4: a run that was fenced at {cuts[0]} emits up to {end}"
        if held:
            return None
        fenced = lives[0].cut_off_at(epoch) is not None
        what = "I4: a fenced run emits tokens" if fenced else "I2: tokens are sent"
        return f"{what} that the ledger does not have at {tokens.position}"
