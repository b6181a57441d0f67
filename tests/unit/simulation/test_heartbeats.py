"""Who may be taken for dead and from whom a session may be taken, judged from heartbeats: each
excuse holds as long as it must, and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loadtest.simulation.checkers.heartbeats import ACTS_S, Heartbeats
from loadtest.simulation.loop import Process

R1 = (b"r1", b"1")
SESSION = "ses_a"
STEP_S = 0.25


class Scene:
    """A gateway that reads the fleet and a replica that beats, four times a second each."""

    def __init__(self) -> None:
        self.alive = True
        self.now_s = 0.0
        self.count = 0
        self.gateway = Process("g1")
        self.heartbeats = Heartbeats(lambda _: self.alive)

    def go_on(self, seconds: float, *, beats: bool = True, reads: bool = True) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            if beats:
                self.count += 1
                self.heartbeats.beat(R1, self.count, self.now_s)
            if reads:
                self.heartbeats.read(self.gateway, self.now_s, self.now_s)

    def down(self) -> str | None:
        return self.heartbeats.judge_down(self.gateway, R1, self.now_s)

    def taken(self) -> str | None:
        return self.heartbeats.judge_taking(self.gateway, SESSION, R1, self.now_s)

    def surely(self) -> tuple[bool, bool]:
        up = self.heartbeats.surely_up(self.gateway, R1, self.now_s)
        return up, self.heartbeats.surely_down(self.gateway, R1, self.now_s)


@pytest.fixture
def scene() -> Scene:
    built = Scene()
    built.go_on(10)
    return built


def test_who_beats_is_neither_down_nor_taken_from(scene: Scene) -> None:
    assert (scene.down() or "").startswith("P9: ")
    assert (scene.taken() or "").startswith("P10: ")
    assert scene.surely() == (True, False)


def test_who_is_silent_for_a_lease_may_be_down(scene: Scene) -> None:
    scene.go_on(0.75, beats=False)
    assert scene.down() is not None
    scene.go_on(0.25, beats=False)
    assert scene.down() is None
    assert scene.taken() is None


def test_who_is_dead_may_be_taken_from_and_is_known_in_the_end(scene: Scene) -> None:
    scene.alive = False
    assert scene.taken() is None
    assert scene.surely() == (False, False)
    scene.go_on(4, beats=False)
    assert scene.surely() == (False, True)


def test_silence_of_the_store_proves_nothing_about_replicas(scene: Scene) -> None:
    scene.go_on(8, beats=False, reads=False)
    scene.go_on(0.75, beats=False)
    assert scene.down() is not None, "the amnesty is not over"
    scene.alive = False
    assert scene.surely() == (False, False)
    scene.go_on(4, beats=False)
    assert scene.surely() == (False, True)


def test_a_repeated_heartbeat_is_none(scene: Scene) -> None:
    for _ in range(4):
        scene.go_on(0.25, beats=False)
        scene.heartbeats.beat(R1, scene.count, scene.now_s)
    assert scene.down() is None


def test_a_beat_that_was_not_read_yet_does_not_count(scene: Scene) -> None:
    scene.go_on(1, beats=False)
    scene.heartbeats.beat(R1, scene.count + 1, scene.now_s + 0.01)
    assert scene.down() is None


def skew(scene: Scene) -> None:
    scene.gateway.rate = 3.0


def jump(scene: Scene) -> None:
    scene.gateway.ahead_s = 600.0


@pytest.mark.parametrize("disturb", [skew, jump])
def test_a_clock_excuses_until_a_lease_after_it_is_right_again(
    scene: Scene, disturb: Callable[[Scene], None]
) -> None:
    disturb(scene)
    assert (scene.down(), scene.taken()) == (None, None)
    scene.go_on(2)
    scene.gateway.rate = 1.0
    scene.go_on(0.25)
    assert (scene.down(), scene.taken()) == (None, None)
    scene.go_on(ACTS_S)
    assert scene.down() is not None
    assert scene.taken() is not None


def test_a_clock_that_is_ahead_all_the_while_excuses_nothing() -> None:
    scene = Scene()
    scene.gateway.ahead_s = 600.0
    scene.go_on(10)
    assert scene.down() is not None


def test_a_reset_connection_excuses_while_it_may_be_acted_on(scene: Scene) -> None:
    scene.heartbeats.was_reset(R1, scene.now_s)
    assert scene.taken() is None
    assert scene.surely() == (False, False)
    scene.go_on(ACTS_S)
    assert scene.taken() is not None


def test_a_gateway_without_a_store_acts_on_a_reset_when_it_is_back(scene: Scene) -> None:
    scene.heartbeats.was_reset(R1, scene.now_s)
    scene.go_on(10, reads=False)
    scene.go_on(1)
    assert scene.taken() is None


def test_a_session_given_back_by_a_loss_may_be_taken_until_it_has_an_owner(scene: Scene) -> None:
    scene.heartbeats.went_astray(SESSION)
    assert scene.taken() is None
    other = scene.heartbeats.judge_taking(scene.gateway, "ses_b", R1, scene.now_s)
    assert other is not None, "another session was not lost"
    scene.heartbeats.has_owner(SESSION)
    assert scene.taken() is not None


def test_beats_that_the_store_lost_were_perhaps_seen_by_nobody(scene: Scene) -> None:
    scene.go_on(0.75)
    scene.heartbeats.lost({R1: scene.count - 3}, scene.now_s)
    scene.go_on(0.25, beats=False)
    assert scene.down() is None
    assert scene.surely() == (False, False)
    scene.go_on(5)
    assert scene.down() is not None
    assert scene.surely() == (True, False)


def test_counters_that_went_back_are_no_beats_until_they_pass_their_old_value(
    scene: Scene,
) -> None:
    scene.heartbeats.lost({R1: scene.count - 8}, scene.now_s)
    scene.count -= 8
    scene.go_on(1)
    assert scene.down() is None
    scene.go_on(2)
    assert scene.down() is not None


def test_who_never_read_the_fleet_is_not_judged() -> None:
    scene = Scene()
    assert (scene.down(), scene.taken(), scene.surely()) == (None, None, (False, False))
    assert scene.heartbeats.judge_taking(None, SESSION, R1, 0.0) is None
