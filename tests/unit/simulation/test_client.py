"""What is counted of a client's streams: that it went on when a gateway died under one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import Unavailable
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.clients.heard import TurnHeard
from loadtest.simulation.coverage import Row
from loadtest.simulation.loop import run
from tests.unit.simulation.small_world import asked, lone

ACCEPTED = pb.TurnEvent(accepted=pb.TurnAccepted(turn_id="t0", output_start=pb.Position(length=4)))


def tokens(position: int) -> pb.TurnEvent:
    return pb.TurnEvent(tokens=pb.TurnTokens(position=position, token_ids=[7], digest=b"d"))


class Gateways:
    """Each stream hears these events and then breaks; ``dies``: with its gateway."""

    def __init__(self, dies: bool) -> None:
        self.nodes = {name: SimpleNamespace(ended=False) for name in ("g1", "g2")}
        self.events: list[pb.TurnEvent] = []
        self._dies = dies

    async def stream(self, gateway: str, *_: object, **__: object) -> AsyncIterator[bytes]:
        yield pb.TurnStream(events=self.events).SerializeToString()
        self.nodes[gateway].ended = self._dies
        raise Unavailable("the stream broke")


class Chooser(Agent):
    """Goes through the gateway that it is told."""

    through = ""

    def _gateway(self) -> str:
        return self.through


@pytest.mark.parametrize(
    ("dies", "then", "events", "counts"),
    [
        (True, "g2", [ACCEPTED, tokens(5)], 1),
        (False, "g2", [ACCEPTED, tokens(5)], 0),
        (True, "g1", [ACCEPTED, tokens(5)], 0),
        (True, "g2", [ACCEPTED], 0),
    ],
    ids=["through another", "it lives", "through the same one again", "no token comes"],
)
def test_a_client_has_gone_on_when_another_gateway_gives_it_the_next_tokens(
    dies: bool, then: str, events: list[pb.TurnEvent], counts: int
) -> None:
    gateways, coverage = Gateways(dies), Counter[str]()
    timeline = SimpleNamespace(note=lambda *_: None)
    world = SimpleNamespace(
        network=gateways, gateways=gateways.nodes, coverage=coverage, timeline=timeline
    )
    agent = lone(Chooser, world, lossy=True, poison=True)  # it neither cancels nor stalls
    heard = TurnHeard("ses_a", "t0", asked("t0", "x"))

    async def listen() -> None:
        for gateway, said in (("g1", [ACCEPTED, tokens(4)]), (then, events), (then, [ACCEPTED])):
            gateways.events, agent.through = said, gateway
            await agent.listen(heard)

    run(listen, 1, None)
    assert heard.violations == []
    assert coverage[Row.GATEWAY_DIES] == counts
