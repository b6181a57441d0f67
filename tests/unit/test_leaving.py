"""Replicas that are told to end: emptied first if there is where to, and else not kept waiting."""

from __future__ import annotations

from typing import cast

import anyio
import pytest
from sessile.v1 import fleet_pb2

from gateway.core.fleet import Replica
from gateway.core.machines import ReplicaState
from gateway.core.migration import has_no_target
from loadtest.simulation.loop import run
from loadtest.simulation.world import SimReplica
from tests.support.fleets import fleet
from tests.support.fleets import replica as made_replica
from tests.support.served_world import Served, finished, served, turn_request
from tests.support.wire import Answer
from workers.replica import _leave
from workers.service import ReplicaApp

GRACE_S = 20.0


async def ended(*replicas: SimReplica, within_s: float) -> float:
    """Seconds until these processes have ended."""
    began = anyio.current_time()
    with anyio.fail_after(within_s):
        while not all(replica.ended for replica in replicas):  # noqa: ASYNC110
            await anyio.sleep(0.05)
    return anyio.current_time() - began


async def session_on(s: Served, name: str, request_id: str) -> str:
    """One with a turn behind it."""
    for attempt in range(20):
        session_id = await s.open(f"{request_id} {attempt}")
        (await s.turn(session_id, "t0")).check()
        if (await s.owner(session_id)).name == name:
            return session_id
    raise AssertionError("no session was placed there")


def test_a_whole_fleet_that_is_told_to_end_does_not_wait_for_a_place() -> None:
    async def main() -> None:
        async with served("a", "b", drain_grace_s=GRACE_S) as s:
            sessions = [await session_on(s, name, name) for name in ("a", "b")]
            both = [s.world.replicas[name] for name in ("a", "b")]
            for replica in both:
                replica.stop.set()
            assert await ended(*both, within_s=GRACE_S) < 5
            await s.world.start_replica("c")
            for session_id in sessions:
                answer = await s.turn(session_id, "t1")
                answer.check()
                assert finished(answer).usage.output_tokens == 8
                assert (await s.owner(session_id)).name == "c"

    run(main, seed=3)


def test_the_last_replica_that_is_told_to_end_lets_its_turn_end() -> None:
    async def main() -> None:
        async with served("a", drain_grace_s=GRACE_S) as s:
            session_id = await session_on(s, "a", "r")
            replica = s.world.replicas["a"]
            answers: list[Answer] = []

            async def turn() -> None:
                request = turn_request(session_id, "t1", max_tokens=400, ignore_eos=True)
                answers.append(await s.call("RunTurn", request))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(turn)
                await anyio.sleep(0.5)
                assert replica.app is not None
                assert replica.app.load().running_turns == 1
                replica.stop.set()
                took_s = await ended(replica, within_s=GRACE_S)
            assert 5 < took_s < 15
            (answer,) = answers
            answer.check()
            assert finished(answer).usage.output_tokens == 400

    run(main, seed=3)


def test_who_leaves_with_a_place_for_its_sessions_is_emptied() -> None:
    async def main() -> None:
        async with served("a", "b", drain_grace_s=GRACE_S) as s:
            session_id = await session_on(s, "a", "r")
            replica = s.world.replicas["a"]
            replica.stop.set()
            await ended(replica, within_s=GRACE_S)
            assert (await s.owner(session_id)).name == "b"
            answer = await s.turn(session_id, "t1")
            assert finished(answer).usage.cached_tokens > 0, "its KV came with it"

    run(main, seed=3)


@pytest.mark.parametrize("by_operator", [False, True])
def test_a_session_that_was_moved_here_and_not_used_since_moves_on_first(
    by_operator: bool,
) -> None:
    """A rolling restart moves idle sessions to the replica that is restarted next."""

    async def main() -> None:
        async with served("a", drain_grace_s=GRACE_S) as s:
            session_id = await session_on(s, "a", "r")
            for source, target in (("a", "b"), ("b", "c")):
                await s.world.start_replica(target)
                await anyio.sleep(1.5)
                if by_operator:
                    drain = fleet_pb2.DrainReplicaRequest(replica_id=source, shutdown=True)
                    (await s.call("DrainReplica", drain)).check()
                else:
                    s.world.replicas[source].stop.set()
                await ended(s.world.replicas[source], within_s=GRACE_S)
                assert (await s.owner(session_id)).name == target
            answer = await s.turn(session_id, "t1")
            assert finished(answer).usage.cached_tokens > 0, "its KV came with it"

    run(main, seed=3)


def test_without_a_gateway_that_could_tell_the_grace_is_waited_out() -> None:
    async def main() -> None:
        async with served("a", drain_grace_s=GRACE_S) as s:
            await session_on(s, "a", "r")
            s.world.kill(s.world.gateways["g"])
            replica = s.world.replicas["a"]
            replica.stop.set()
            assert await ended(replica, within_s=60) == pytest.approx(GRACE_S, abs=3)

    run(main, seed=3)


class Emptied:
    """In the place of a ReplicaApp of which all is moved, and then a call comes for what was."""

    def __init__(self) -> None:
        self.ids = ["ses_a"]

    def session_ids(self) -> list[str]:
        return self.ids

    async def leave(self) -> bool:
        return True


def test_a_call_for_a_session_that_was_moved_is_none_that_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    anyio.run(_leave, cast(ReplicaApp, Emptied()), GRACE_S, anyio.Event())
    assert "ends with" not in caplog.text


LEAVING = made_replica("a", state=ReplicaState.DRAINING)


@pytest.mark.parametrize(
    ("other", "none"),
    [
        (made_replica("b", state=ReplicaState.DRAINING), True),
        (made_replica("b", state=ReplicaState.DOWN), True),
        (made_replica("b", model="another"), True),
        (made_replica("b", token_fingerprint="cc" * 16), True),
        (made_replica("b", state=ReplicaState.READY), False),
        (made_replica("b", state=ReplicaState.SUSPECT), False),
        (made_replica("b", state=ReplicaState.PENDING), False),
        (made_replica("b", kv_fingerprint="cc" * 16), False),
    ],
)
def test_only_who_can_never_take_a_session_is_no_hope(other: Replica, none: bool) -> None:
    third = made_replica("c", state=ReplicaState.DRAINING)
    assert has_no_target(LEAVING, fleet(LEAVING))
    assert has_no_target(LEAVING, fleet(LEAVING, other)) is none
    assert has_no_target(LEAVING, fleet(LEAVING, other, third)) is none
