"""Watches that turns go on while nothing is wrong (I7, P6, P15): once nothing has been broken for a
while, a turn that a client waits for adds tokens if its owner lives, and is taken over if not."""

from __future__ import annotations

from loadtest.simulation.checkers.fleet_facts import understands
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.loop import Process, true_time
from loadtest.simulation.world import SimGateway, SimReplica, World

CALM_S = 6.0
"""After this long without a fault, what it had broken is mended: leases, holds and keep-alives have
ended."""
FREE_SHARE = 0.25
"""Of an engine's pages: with fewer, turns may wait for each other's."""
STALL_S = 3.0
"""A turn that has a place adds a token every 20 ms or so. One whose owner is dead is taken over
within a lease, and then by the next attempt of whoever waits for it, at most 2 s later."""


class Progress:
    """:meth:`sample` is called every so often."""

    def __init__(self, world: World, witness: Witness, agents: list[Agent]) -> None:
        self.violations: list[str] = []
        self._world = world
        self._witness = witness
        self._agents = agents
        self._calm_since = 0.0
        self._processes: list[Process] = []
        self._seen: dict[str, tuple[object, float]] = {}
        """Session -> how its turn stands, and since when."""

    def sample(self) -> None:
        now = true_time()
        if not self._calm():
            self._calm_since = now
        if self._witness.lost_s is not None:
            self._calm_since = max(self._calm_since, self._witness.lost_s)
        for agent in self._agents:
            waited_for = agent.waits_for
            if waited_for is None:
                self._seen.pop(agent.session_id, None)
                continue
            state = (waited_for, *self._witness.stand(agent.session_id, waited_for))
            before, since = self._seen.get(agent.session_id, (None, now))
            if before != state:
                self._seen[agent.session_id] = state, now
            elif now - since > STALL_S and now - self._calm_since > CALM_S:
                why = self._stalled(agent.session_id, waited_for)
                if why is not None:
                    self.violations.append(
                        f"{agent.session_id}: I7: {waited_for} {why} since {since:.2f} s,"
                        f" and nothing is broken since {self._calm_since:.2f} s"
                    )
                self._seen[agent.session_id] = state, now

    def _calm(self) -> bool:
        world = self._world
        nodes: list[SimReplica | SimGateway] = [
            *(node for _, node in sorted(world.replicas.items())),
            *(node for _, node in sorted(world.gateways.items())),
        ]
        before, self._processes = self._processes, [node.process for node in nodes]
        return (
            before == self._processes
            and world.weather.fair
            and world.network.fair
            and all(not (n.ended or n.process.stopped) and n.process.rate == 1.0 for n in nodes)
            and all(replica.engine.as_usual for replica in world.replicas.values())
        )

    def _stalled(self, session_id: str, turn_id: str) -> str | None:
        """What is wrong with a turn that stands where it stood; None if it may."""
        if not self._witness.runs(session_id, turn_id):
            return None
        owner = self._witness.owner(session_id)
        replica = self._world.replicas.get(owner[0].decode())
        if replica is not None and self._world.whose(replica.process) == owner:
            return "has not gone on" if _has_room(replica) else None
        if any(_has_room(other) for other in self._able(session_id)):
            return f"has had no live owner (but {owner[0].decode() or 'nobody'})"
        return None

    def _able(self, session_id: str) -> list[SimReplica]:
        """Live replicas that may be given the session."""
        speaks = self._witness.fingerprint(session_id)
        return [
            replica
            for replica in self._world.live_replicas()
            if replica.ref is not None
            and not self._world.server.is_draining(replica.ref)
            and understands(self._world, replica.name, speaks)
        ]


def _has_room(replica: SimReplica) -> bool:
    """For all its turns, and without waiting."""
    load = replica.engine.load()
    return load.queued == 0 and load.free_pages >= FREE_SHARE * replica.engine.info.capacity_pages
