"""What is sampled while a world runs: sizes of tables, and whom gateways take for down."""

from __future__ import annotations

from types import SimpleNamespace as Some
from typing import cast

import pytest

from gateway.config import GatewayConfig
from gateway.core.machines import ReplicaState
from loadtest.simulation.checkers import bounds, verdicts
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.loop import Process, run
from loadtest.simulation.world import SimGateway, SimReplica, World
from statestore.records import ReplicaRef
from statestore.replica_info import MAX_LEADING

CONFIG = GatewayConfig()


def gateway(*, streams: int = 0, owners: int = 0, salts: int = 0, dispatches: int = 0) -> Some:
    directory = Some(_known=range(owners), _salts=range(salts))
    turns = Some(_services=Some(directory=directory), open_streams=streams)
    fleet = Some(_attempts=range(dispatches))
    return Some(name="g1", app=Some(config=CONFIG, turns=turns, fleet=fleet))


MOST_STREAMS, TABLES = CONFIG.admission.max_streams, CONFIG.tables
FULL = {
    "streams": MOST_STREAMS,
    "owners": TABLES.owners,
    "salts": TABLES.salts,
    "dispatches": MOST_STREAMS,
}


def judged(*, gateways: list[Some], replicas: list[Some]) -> list[str]:
    engine = Some(max_running=2, max_queued=1, capacity_pages=9)
    world = Some(
        engine=engine,
        max_resident_sessions=2,
        live_gateways=lambda: gateways,
        live_replicas=lambda: replicas,
    )
    watch = bounds.Bounds(cast(World, world), [])
    for one in gateways:
        watch._judge("g1", bounds._sizes_of_gateway(cast(SimGateway, one)))
    for one in replicas:
        sizes = bounds._sizes_of_replica(cast(World, world), cast(SimReplica, one))
        watch._judge("r1", sizes)
    return watch.violations


@pytest.mark.parametrize("what", ["", *FULL])
def test_a_gateways_tables_are_told_when_they_pass_their_bounds(what: str) -> None:
    sizes = {name: most + (name == what) for name, most in FULL.items()}
    found = judged(gateways=[gateway(**sizes)], replicas=[])
    assert len(found) == bool(what)
    assert all("I8: " in one for one in found)


REPLICA = {
    "running": 2, "queued": 1, "runs": 3, "receivers": 3, "sessions": 5,
    "leading": MAX_LEADING, "pinned": 9,
}  # fmt: skip


@pytest.mark.parametrize("what", ["", *REPLICA])
def test_so_are_a_replicas(what: str) -> None:
    of = {name: most + (name == what) for name, most in REPLICA.items()}
    load = Some(running=of["running"], queued=of["queued"], pinned_pages=of["pinned"])
    residency = Some(_sessions=range(of["sessions"]), _leading=range(of["leading"]))
    ports = Some(residency=residency, dispatcher=Some(_receivers=range(of["receivers"])))
    app = Some(_runs=range(of["runs"]), _ports=ports)
    replica = Some(name="r1", engine=Some(load=lambda: load), app=app)
    found = judged(gateways=[], replicas=[replica])
    assert len(found) == bool(what)
    assert all("I8: " in one for one in found)


@pytest.mark.parametrize(
    ("left", "wrong"), [({}, 0), ({"streams": 1}, 1), ({"dispatches": 1}, 1), ({"owners": 1}, 0)]
)
def test_a_stream_that_nobody_has_any_more_is_told(left: dict[str, int], wrong: int) -> None:
    world = Some(live_gateways=lambda: [gateway(**left)])
    assert len(bounds.check_idle(cast(World, world))) == wrong


@pytest.mark.parametrize(
    ("state", "unfit", "silent", "samples", "wrong"),
    [
        (ReplicaState.DOWN, False, False, 1, 1),
        (ReplicaState.DOWN, False, False, 3, 1),
        (ReplicaState.DOWN, False, True, 1, 0),
        (ReplicaState.DOWN, True, False, 1, 0),
        (ReplicaState.SUSPECT, False, False, 1, 0),
    ],
    ids=["beats", "told once", "silent", "said good-bye", "only suspected"],
)
def test_a_gateway_has_a_reason_to_take_a_replica_for_down(
    state: ReplicaState, unfit: bool, silent: bool, samples: int, wrong: int
) -> None:
    seen = Some(state=state, ref=ReplicaRef("r1", 7))
    node = Some(process=Process("g1"), app=Some(fleet=Some(snapshot=Some(replicas=[seen]))))
    heartbeats = Some(judge_down=lambda *_: None if silent else "P9: it beats")
    witness = Some(is_unfit=lambda ref: unfit and ref == (b"r1", b"7"), heartbeats=heartbeats)
    world = Some(live_gateways=lambda: [node])
    watch = verdicts.Verdicts(cast(World, world), cast(Witness, witness))

    async def sample() -> None:
        for _ in range(samples):
            watch.sample()

    run(sample, 1, None)
    assert watch.violations == ["P9: it beats"] * wrong
