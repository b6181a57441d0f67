"""Watches KV on its way between replicas (P12, P13, P14, I10)."""

from __future__ import annotations

from typing import Any

from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.engine import page_of
from loadtest.simulation.loop import Process, current_process, true_time
from loadtest.simulation.world import World
from statestore import keys
from statestore.digest import unpack_tokens
from workers.engines.sim.model import Context


class MoveWatch:
    """Complains to the world."""

    def __init__(self, world: World, witness: Witness) -> None:
        self._world = world
        self._witness = witness

    def attach(self, nothing_is_evicted: bool) -> None:
        """From now on every page that is sent is watched, every reset connection noted, and every
        move (if nothing is evicted that was moved) compared with what its target holds."""
        self._world.network.on_page = self._page
        self._world.network.on_reset = self._reset
        if nothing_is_evicted:
            self._witness.moved = self._moved

    def _page(
        self, target: Process | None, source: Process, export: Any, reservation: Any, index: int
    ) -> None:
        if target is not None:
            theirs, ours = self._world.serving[source].engine, self._world.serving[target].engine
            ours.page_arrives(theirs, export, reservation, index)

    def _reset(self, process: Process) -> None:
        ref = self._world.whose(process)
        if ref is not None:
            self._witness.heartbeats.was_reset(ref, true_time())

    def _moved(self, session_id: str, owner: Ref, ledger: bytes) -> None:
        """A move that may not recompute leaves the target with every whole page before the last
        token."""
        mover = current_process()
        target = self._world.replicas.get(owner[0].decode())
        record = self._world.server.peek(keys.session_key(session_id))
        if mover is None or target is None or not isinstance(record, dict):
            return
        if record.get(b"segments") or self._world.whose(target.process) != owner:
            return
        tokens, size = unpack_tokens(ledger), target.engine.info.page_size
        model = Context()
        whole = (len(tokens) - 1) // size
        pages = [page_of(model, tokens[at * size : (at + 1) * size]) for at in range(whole)]
        lacking = target.engine.lacks(pages)
        if lacking:
            self._world.violations.append(
                f"{session_id}: P12: moved to {target.ref}, which lacks {lacking} of {whole} pages"
            )
