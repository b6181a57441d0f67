"""What a tenant that asks without end costs another one: a whole fleet in virtual time, so that
the figures are of queues and steps and the same on every machine."""

from __future__ import annotations

import itertools
import statistics

import anyio
import grpc
from sessile.v1 import types_pb2 as pb

from loadtest.simulation.loop import run
from tests.support.served_world import STRANGER, TENANT, Served, finished, served, turn_request

SESSIONS = 32
"""Of the hostile tenant; its fleet runs 8 turns at once and queues 16."""
TURNS = 5


async def hostile(it: Served, index: int) -> None:
    """Long prompts and long outputs, again as soon as one ends or is refused."""
    session_id = await it.open(f"h{index}", STRANGER)
    for number in itertools.count():
        request = turn_request(session_id, f"t{number}", max_tokens=300, ignore_eos=True)
        request.messages[0].content = "x" * 300
        answer = await it.call("RunTurn", request, STRANGER, time_s=600, patience_s=600)
        if answer.code is not grpc.StatusCode.OK:
            await anyio.sleep(0.05)


async def turn_times(*, attacked: bool) -> list[float]:
    """Seconds of a polite tenant's turns, one after the other."""
    took: list[float] = []
    async with served("a", "b") as it, anyio.create_task_group() as tasks:
        session_id = await it.open("polite")
        if attacked:
            for index in range(SESSIONS):
                tasks.start_soon(hostile, it, index)
            await anyio.sleep(5)
        for number in range(TURNS):
            began = anyio.current_time()
            while True:
                answer = await it.turn(session_id, f"t{number}", TENANT, ignore_eos=True)
                if answer.code is grpc.StatusCode.OK:
                    break
                answer.check()
                assert answer.retry_ms, answer
                await anyio.sleep(answer.retry_ms / 1000)
            assert finished(answer).status == pb.TURN_STATUS_COMMITTED
            took.append(anyio.current_time() - began)
        tasks.cancel_scope.cancel()
    return took


def test_a_tenant_that_asks_without_end_slows_another_by_no_more_than_its_share() -> None:
    """Two tenants: each has half, so a turn may take twice as long."""
    times: dict[bool, list[float]] = {}

    async def test() -> None:
        for attacked in (False, True):
            times[attacked] = await turn_times(attacked=attacked)

    run(test)
    calm, storm = times[False], times[True]
    print(
        f"\nturn p50 {statistics.median(calm) * 1000:.0f} ms calm, "
        f"{statistics.median(storm) * 1000:.0f} ms under attack (worst {max(storm) * 1000:.0f})"
    )
    assert statistics.median(storm) <= 2 * statistics.median(calm)
    assert max(storm) <= 3 * max(calm)
