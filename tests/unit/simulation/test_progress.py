"""Turns that stand still: told when nothing is broken, whether their owner lives or not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loadtest.simulation.checkers import progress
from loadtest.simulation.checkers.progress import CALM_S, STALL_S, Progress
from loadtest.simulation.checkers.stored import Ref
from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.clients.agents import Agent
from loadtest.simulation.loop import Process
from loadtest.simulation.world import World

STEP_S = 0.25


class Scene:
    """One client that waits for one turn, one replica r1 and a gateway."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.free_pages, self.speaks = 100, b""
        monkeypatch.setattr(progress, "true_time", lambda: self.now_s)
        self.engine = SimpleNamespace(
            load=lambda: SimpleNamespace(queued=0, free_pages=self.free_pages),
            info=SimpleNamespace(capacity_pages=100),
            as_usual=True,
        )
        self.replica = self.node("r1", engine=self.engine, ref=object())
        self.gateway = self.node("g1")
        self.weather = SimpleNamespace(fair=True)
        self.network = SimpleNamespace(fair=True)
        self.owner: Ref = (b"r1", b"1")
        self.draining = False
        self.runs = True
        self.length = 0
        world = SimpleNamespace(
            replicas={"r1": self.replica},
            gateways={"g1": self.gateway},
            weather=self.weather,
            network=self.network,
            whose=lambda process: (b"r1", b"1"),
            live_replicas=lambda: [self.replica],
            server=SimpleNamespace(is_draining=lambda ref: self.draining),
            other_tokens=frozenset(),
        )
        self.witness = SimpleNamespace(
            stand=lambda *_: (self.length, b"RUNNING"),
            runs=lambda *_: self.runs,
            owner=lambda _: self.owner,
            fingerprint=lambda _: self.speaks,
            lost_s=None,
        )
        self.agent = SimpleNamespace(session_id="ses_a", waits_for="t0")
        self.progress = Progress(
            cast(World, world), cast(Witness, self.witness), [cast(Agent, self.agent)]
        )

    @staticmethod
    def node(name: str, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, process=Process(name), ended=False, **more)

    def go_on(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            meanwhile()
            self.progress.sample()
        return self.progress.violations


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


LONG_S = CALM_S + 1


def test_a_turn_that_goes_on_is_well(scene: Scene) -> None:
    def add() -> None:
        scene.length += 4

    assert scene.go_on(2 * LONG_S, add) == []


def test_a_turn_that_stands_still_with_its_owner_is_told(scene: Scene) -> None:
    (what,) = scene.go_on(LONG_S)
    assert what.startswith("ses_a: I7: t0 has not gone on ")


@pytest.mark.parametrize("owner", [(b"r1", b"0"), (b"r9", b"1"), (b"", b"")])
def test_a_turn_that_nobody_takes_from_the_dead_is_told(scene: Scene, owner: Ref) -> None:
    scene.owner = owner
    (what,) = scene.go_on(LONG_S)
    assert what.startswith("ses_a: I7: t0 has had no live owner ")


def draining(scene: Scene) -> None:
    scene.draining = True


def full(scene: Scene) -> None:
    scene.free_pages = 20


def foreign(scene: Scene) -> None:
    scene.speaks = b"others'"


@pytest.mark.parametrize("hinder", [draining, full, foreign])
def test_nobody_need_take_a_turn_that_nobody_can_take(
    scene: Scene, hinder: Callable[[Scene], None]
) -> None:
    scene.owner = (b"r1", b"0")
    hinder(scene)
    assert scene.go_on(LONG_S) == []


def not_accepted(scene: Scene) -> None:
    scene.runs = False


def nobody_waits(scene: Scene) -> None:
    scene.agent.waits_for = None


@pytest.mark.parametrize("excuse", [full, not_accepted, nobody_waits])
def test_a_turn_may_stand_still_for_a_reason(scene: Scene, excuse: Callable[[Scene], None]) -> None:
    excuse(scene)
    assert scene.go_on(2 * LONG_S) == []


def foul_weather(scene: Scene) -> None:
    scene.weather.fair = not scene.weather.fair


def foul_network(scene: Scene) -> None:
    scene.network.fair = not scene.network.fair


def stopped(scene: Scene) -> None:
    scene.replica.process.stopped = not scene.replica.process.stopped


def slow(scene: Scene) -> None:
    scene.engine.as_usual = not scene.engine.as_usual


def restarted(scene: Scene) -> None:
    scene.gateway.process = Process("g1")


def writes_lost(scene: Scene) -> None:
    scene.witness.lost_s = scene.now_s


@pytest.mark.parametrize(
    "break_it", [foul_weather, foul_network, stopped, slow, restarted, writes_lost]
)
def test_nothing_is_told_until_a_while_after_the_last_fault(
    scene: Scene, break_it: Callable[[Scene], None]
) -> None:
    scene.go_on(CALM_S - 1)
    break_it(scene)
    scene.go_on(STEP_S)
    if break_it not in (restarted, writes_lost):
        break_it(scene)  # twice: as before
    assert scene.go_on(CALM_S - 1) == []
    assert scene.go_on(STALL_S + 2) != []


def test_a_skewed_clock_is_a_fault(scene: Scene) -> None:
    scene.gateway.process.rate = 3.0
    assert scene.go_on(2 * LONG_S) == []
