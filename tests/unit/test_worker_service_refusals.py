"""What a replica refuses, and that a refusal changes nothing."""

from __future__ import annotations

import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from tests.support.replica_world import (
    Heard,
    in_virtual_time,
    listen,
    message,
    world,
)
from workers.config import TurnLimits
from workers.engines.sim.config import SimConfig, SimTiming


@in_virtual_time
async def test_a_repeat_with_other_input_is_refused() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica))
        with pytest.raises(errors.TurnConflict):
            await listen(replica, await w.request(replica, "Something else"))
        assert (await listen(replica, await w.request(replica, ""))).tokens


@in_virtual_time
async def test_attach_only_does_not_begin_a_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        with pytest.raises(errors.NotFound) as caught:
            await listen(replica, await w.request(replica, attach_only=True))
        assert caught.value.reason == "TURN_NOT_FOUND"
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_other_tenants_incarnations_and_epochs_are_turned_away() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        request.tenant = "other"
        with pytest.raises(errors.NotFound):
            await listen(replica, request)
        request = await w.request(replica)
        request.replica.incarnation += 1
        with pytest.raises(errors.NotOwner):
            await listen(replica, request)
        request = await w.request(replica)
        await w.give(replica)  # a newer epoch
        with pytest.raises(errors.NotOwner):
            await listen(replica, request)
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_input_over_the_context_is_refused_before_anything_is_written() -> None:
    config = SimConfig(max_context_tokens=64)
    async with world(config) as w:
        replica = await w.start_owner()
        with pytest.raises(errors.ContextTooLong):
            await listen(replica, await w.request(replica, "x" * 100))
        session = await w.session()
        assert session.head.length == 0
        assert session.active_turn_id is None
        heard = await listen(replica, await w.request(replica, "x", params={"max_tokens": 1000}))
        assert heard.finished.reason == types_pb2.FINISH_REASON_LENGTH
        assert heard.finished.end.length == 64


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 3.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"max_tokens": 2, "min_tokens": 3},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [1 << 30]},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object]) -> None:
    @in_virtual_time
    async def refused() -> None:
        async with world() as w:
            replica = await w.start_owner()
            with pytest.raises(errors.InvalidRequest):
                await listen(replica, await w.request(replica, params=params))
            assert (await w.session()).head.length == 0

    refused()


@in_virtual_time
async def test_messages_must_have_roles_and_fit() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        request.turn.messages.append(types_pb2.Message(content="who?"))
        with pytest.raises(errors.InvalidRequest):
            await listen(replica, request)
        request = await w.request(replica)
        request.turn.messages.extend([message("x")] * 1025)
        with pytest.raises(errors.InvalidRequest):
            await listen(replica, request)
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_the_precondition_tells_a_stale_client_from_lost_data() -> None:
    async with world() as w:
        replica = await w.start_owner()
        live = await listen(replica, await w.request(replica))
        good = types_pb2.Precondition(head=live.finished.end, turn_index=1)
        stale = types_pb2.Precondition(head=types_pb2.Position(length=3), turn_index=0)
        ahead = types_pb2.Precondition(head=types_pb2.Position(length=999), turn_index=1)
        forked = types_pb2.Precondition(
            head=types_pb2.Position(length=live.finished.end.length, digest=b"x" * 16),
            turn_index=1,
        )
        for pre, error in [
            (stale, errors.StaleClient),
            (ahead, errors.DataLoss),
            (forked, errors.DataLoss),
        ]:
            with pytest.raises(error):
                await listen(replica, await w.request(replica, "x", "t2", precondition=pre))
        await listen(replica, await w.request(replica, "x", "t2", precondition=good))


@in_virtual_time
async def test_another_turn_of_a_busy_session_is_refused() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica), until=lambda h: len(h.tokens) > 3)
        with pytest.raises(errors.TurnInProgress):
            await listen(replica, await w.request(replica, "Other", "t2"))


@in_virtual_time
async def test_too_many_turns_are_refused_early() -> None:
    config = SimConfig(max_running=1, max_queued=1, timing=SimTiming(step_ms=10))
    async with world(config) as w:
        replica = await w.start()
        for name in "abc":
            await w.open(f"ses_{name * 16}")
            await w.give(replica, f"ses_{name * 16}")
        for name in "ab":
            request = await w.request(replica, session_id=f"ses_{name * 16}")
            await listen(replica, request, until=lambda h: True)
        with pytest.raises(errors.Overloaded) as caught:
            await listen(replica, await w.request(replica, session_id=f"ses_{'c' * 16}"))
        assert caught.value.retry_after_ms
        assert (await w.session(f"ses_{'c' * 16}")).head.length == 0


@in_virtual_time
async def test_no_tenant_takes_every_place() -> None:
    config = SimConfig(max_running=2, max_queued=6, timing=SimTiming(step_ms=10))
    async with world(config) as w:
        replica = await w.start()

        async def begin(index: int, tenant: str) -> None:
            session_id = f"ses_{index:016d}"
            await w.open(session_id, tenant=tenant)
            await w.give(replica, session_id)
            request = await w.request(replica, session_id=session_id)
            request.tenant = tenant
            await listen(replica, request, until=lambda h: True)

        for index in range(6):
            await begin(index, "mallory")
        with pytest.raises(errors.Overloaded):
            await begin(6, "mallory")
        await begin(7, "alice")
        await begin(8, "bob")
        with pytest.raises(errors.Overloaded):
            await begin(9, "carol")


@in_virtual_time
async def test_a_foreign_tenant_does_not_disturb_a_running_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        foreign = await w.request(replica)
        foreign.tenant, foreign.epoch.number = "other", foreign.epoch.number + 1

        async def disturb() -> None:
            with pytest.raises(errors.NotFound, match="does not exist"):
                await listen(replica, foreign)

        heard = await listen(replica, await w.request(replica), between=disturb)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_streams_of_one_turn_are_bounded() -> None:
    async with world(limits=TurnLimits(max_streams=1)) as w:
        replica = await w.start_owner()
        request = await w.request(replica)

        heard = Heard()

        async def second() -> None:
            if len(heard.tokens) < 5:
                with pytest.raises(errors.Overloaded):
                    await listen(replica, request)

        await listen(replica, request, heard, between=second)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
