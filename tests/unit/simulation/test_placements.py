"""Choices of a replica, judged by what the world is and not by what the chooser says of it."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from gateway.app import assignment
from gateway.app import migration as app_migration
from gateway.core import migration
from gateway.core.fleet import AssumedLoad, FleetSnapshot, Replica
from gateway.core.machines import ReplicaState
from gateway.core.placement import (
    Cost,
    Decision,
    NoCandidate,
    PlacementModel,
    PlacementRequest,
    place,
)
from loadtest.simulation.checkers import placements
from loadtest.simulation.checkers.placements import Placements, judged_placements
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.loop import Process
from loadtest.simulation.world import OtherTokens, World
from statestore.records import ReplicaRef
from statestore.replica_info import ReplicaDetails, ReplicaLoad
from workers.text.bytes_codec import BytesCodec

REQUEST = PlacementRequest("ses_a", "sim", history_tokens=100, new_tokens=10)
MINE = BytesCodec.token_fingerprint
DETAILS = ReplicaDetails("e:1", "sim", "sim", MINE.hex(), "aa", 8, 256, 2048, 4, 8)
R1 = Replica(ReplicaRef("r1", 1), DETAILS, ReplicaLoad(), ReplicaState.READY)
R2 = replace(R1, ref=ReplicaRef("r2", 1))
FULL = replace(R1, assumed=AssumedLoad(turns=12))
NOBODY = NoCandidate((), overloaded=False)


class Scene:
    """Replicas r1 and r2 that serve and live, until something is said otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placements, "current_process", lambda: Process("g1"))
        monkeypatch.setattr(placements, "true_time", lambda: 10.0)
        info = SimpleNamespace(max_context_tokens=2048, capacity_pages=256, page_size=8)
        nodes = [
            SimpleNamespace(
                name=one.ref.replica_id,
                process=Process(one.ref.replica_id),
                ref=one.ref,
                engine=SimpleNamespace(info=info),
            )
            for one in (R1, R2)
        ]
        self.up, self.down, self.fit = True, False, True
        self.speaks = MINE
        self.world = SimpleNamespace(
            serving={node.process: node for node in nodes},
            live_replicas=lambda: nodes,
            whose=lambda process: (process.name.encode(), b"1"),
            other_tokens=frozenset(),
            other_weights=frozenset(),
            violations=[],
        )
        witness = SimpleNamespace(
            fingerprint=lambda _: self.speaks,
            surely_fit=lambda _: self.fit,
            heartbeats=SimpleNamespace(
                surely_up=lambda *_: self.up, surely_down=lambda *_: self.down
            ),
        )
        self.witness = cast(Witness, witness)
        self.placements = Placements(cast(World, self.world), self.witness)

    def judge(
        self,
        chosen: Decision | NoCandidate,
        request: PlacementRequest = REQUEST,
        fleet: tuple[Replica, ...] = (R1, R2),
    ) -> list[str]:
        self.placements.judge(FleetSnapshot(fleet), request, chosen)
        return [str(what) for what in self.world.violations]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def chosen(target: Replica, source: Replica | None = None) -> Decision:
    cost = Cost(target.ref, 0, 0, 0, 0, 0, None if source is None else source.ref)
    return Decision(target, cost, source, (cost,), ())


def test_a_replica_that_understands_and_lives_is_a_place(scene: Scene) -> None:
    assert scene.judge(chosen(R1)) == []
    assert scene.judge(chosen(R1, source=R2)) == []


def test_a_replica_with_another_tokenizer_is_none_whatever_it_says(scene: Scene) -> None:
    scene.world.other_tokens = frozenset({"r1"})
    (what,) = scene.judge(chosen(R1))
    assert what.startswith("ses_a: P14: ")
    scene.world.violations.clear()
    scene.speaks = b""
    assert scene.judge(chosen(R1)) == [], "it has no tokens yet"
    scene.speaks = OtherTokens.token_fingerprint
    assert scene.judge(chosen(R1)) == []


def test_a_replica_that_is_long_dead_is_none(scene: Scene) -> None:
    scene.down = True
    (what,) = scene.judge(chosen(R1))
    assert what.startswith("ses_a: P9: ")


def test_kv_of_other_weights_is_not_to_be_pulled(scene: Scene) -> None:
    scene.world.other_weights = frozenset({"r2"})
    (what,) = scene.judge(chosen(R1, source=R2))
    assert what.startswith("ses_a: P14: ")


def test_nobody_is_turned_away_whom_somebody_can_take(scene: Scene) -> None:
    found = scene.judge(NOBODY, fleet=(FULL, R2))
    assert [what.partition("P14: ")[2] for what in found] == [f"no place, though {R2.ref} has one"]


def test_a_replica_that_the_chooser_does_not_know_is_a_place_too(scene: Scene) -> None:
    assert len(scene.judge(NOBODY, fleet=())) == 2


def test_what_the_chooser_has_for_down_is_judged_by_the_world(scene: Scene) -> None:
    down = replace(R1, state=ReplicaState.DOWN)
    assert len(scene.judge(NOBODY, fleet=(down, FULL))) == 1


@pytest.mark.parametrize(
    ("wrong", "request_"),
    [
        ({"up": False}, REQUEST),
        ({"fit": False}, REQUEST),
        ({"speaks": b"others'"}, REQUEST),
        ({}, replace(REQUEST, history_tokens=2040)),
        ({}, replace(REQUEST, exclude={R1.ref: "", R2.ref: ""})),
    ],
    ids=["perhaps dead", "draining", "tokens", "too long", "excluded"],
)
def test_who_fits_nowhere_may_be_turned_away(
    scene: Scene, wrong: dict[str, object], request_: PlacementRequest
) -> None:
    for name, value in wrong.items():
        setattr(scene, name, value)
    assert scene.judge(NOBODY, request_) == []


def test_a_move_to_a_named_replica_is_judged_both_ways(scene: Scene) -> None:
    assert scene.placements.unfit(R1, REQUEST) is None
    assert scene.world.violations == []
    scene.placements.unfit(replace(R1, state=ReplicaState.DRAINING), REQUEST)
    assert len(scene.world.violations) == 1
    scene.world.other_tokens = frozenset({"r1"})
    scene.placements.unfit(R1, REQUEST)
    assert len(scene.world.violations) == 2


def chooser(module: ModuleType, name: str) -> Any:
    """As the module looks it up: it does not export what it imports."""
    return getattr(module, name)


def test_every_way_to_choose_is_judged(scene: Scene) -> None:
    fleet, model = FleetSnapshot((R1, R2)), PlacementModel()
    full = replace(R2, load=ReplicaLoad(running_turns=4, queued_turns=8))
    scene.world.other_tokens = frozenset({"r1", "r2"})
    with judged_placements(cast(World, scene.world), scene.witness):
        chooser(assignment, "place")(fleet, REQUEST, model)
        chooser(assignment, "relieve")(fleet, REQUEST, full, model)
        chooser(app_migration, "place")(fleet, REQUEST, model)
        chooser(app_migration, "unfit")(R1, REQUEST)
        chooser(migration, "place")(fleet, REQUEST, model)
    assert len(scene.world.violations) == 5
    assert {chooser(it, "place") for it in (assignment, app_migration, migration)} == {place}
