"""What happened in the ledger counts, also while a replica has not heard of it yet."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core.errors import NotOwner
from loadtest.simulation.redis import Fault, no_fault
from statestore.executor import ScriptCall
from tests.support.replica_world import SESSION, in_virtual_time, listen, world

TOKENS_HEARD = 3


@in_virtual_time
async def test_a_turn_cancelled_behind_the_replicas_back_is_in_nobodys_way() -> None:
    async with world() as w:
        replica = await w.start_owner()
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


@in_virtual_time
async def test_a_client_that_is_ahead_of_a_fenced_run_is_sent_to_the_owner() -> None:
    async with world() as w:
        fenced, owner = await w.start_owner("r1"), await w.start("r2")
        late = await w.request(fenced, params={"max_tokens": 50})
        await listen(fenced, late, until=lambda heard: len(heard.tokens) >= TOKENS_HEARD)

        def unheard(call: ScriptCall) -> Fault:
            old = call.script.name == "append" and call.args[0] == late.epoch.number
            return Fault.REQUEST_LOST if old else Fault.NONE

        w.executor.fault = unheard
        await w.give(owner)
        heard = await listen(owner, await w.request(owner, params={"max_tokens": 50}))
        late.turn.resume_from.CopyFrom(heard.finished.end)
        with pytest.raises(NotOwner):
            await listen(fenced, late)
