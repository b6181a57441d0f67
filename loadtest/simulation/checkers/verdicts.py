"""Samples whom gateways take for down, and judges it by the heartbeats that the store took (P9)."""

from __future__ import annotations

from gateway.core.machines import ReplicaState
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.loop import Process, true_time
from loadtest.simulation.world import World
from statestore.records import ReplicaRef


class Verdicts:
    """:meth:`sample` is called at least as often as gateways read the fleet."""

    def __init__(self, world: World, witness: Witness) -> None:
        self.violations: list[str] = []
        self._world = world
        self._witness = witness
        self._down: set[tuple[Process, ReplicaRef]] = set()

    def sample(self) -> None:
        down: set[tuple[Process, ReplicaRef]] = set()
        for gateway in self._world.live_gateways():
            for replica in gateway.app.fleet.snapshot.replicas:
                if replica.state is ReplicaState.DOWN:
                    down.add((gateway.process, replica.ref))
                    if (gateway.process, replica.ref) not in self._down:
                        self._judge(gateway.process, replica.ref)
        self._down = down

    def _judge(self, gateway: Process, ref: ReplicaRef) -> None:
        named = ref.replica_id.encode(), b"%d" % ref.incarnation
        if self._witness.is_unfit(named):
            return  # it said good-bye, or was replaced
        wrong = self._witness.heartbeats.judge_down(gateway, named, true_time())
        if wrong is not None:
            self.violations.append(wrong)
