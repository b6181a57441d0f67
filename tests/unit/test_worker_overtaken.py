"""A turn that ended in the ledger is over, also while its replica has not heard of it yet."""

from __future__ import annotations

import anyio
from sessile.v1 import types_pb2

from loadtest.simulation.redis import Fault, no_fault
from statestore.executor import ScriptCall
from tests.support.replica_world import SESSION, in_virtual_time, listen, world

TOKENS_HEARD = 3


@in_virtual_time
async def test_a_turn_cancelled_behind_the_replicas_back_is_in_nobodys_way() -> None:
    async with world() as w:
        replica = await w.start("r1")
        await w.open()
        await w.give(replica)
        first = await w.request(replica, params={"max_tokens": 500})
        await listen(replica, first, until=lambda heard: len(heard.tokens) >= TOKENS_HEARD)

        def no_appends(call: ScriptCall) -> Fault:
            return Fault.REQUEST_LOST if call.script.name == "append" else Fault.NONE

        w.executor.fault = no_appends
        await w.store.cancel_turn(SESSION, "t1")
        second = await w.request(replica, "And then?", "t2")

        async def answer_soon() -> None:
            await anyio.sleep(0.5)
            w.executor.fault = no_fault

        w.tasks.start_soon(answer_soon)
        heard = await listen(replica, second)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
