"""Bounds of a gateway: what one tenant has open does not keep another from opening."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import anyio
import pytest
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.admission import Gate
from gateway.config import Admission, GatewayConfig
from gateway.core.errors import Overloaded
from gateway.core.quotas import TenantQuota
from statestore.replica_info import ReplicaLoad
from tests.support.gateway_world import TENANT, simulated, world


def test_a_tenant_has_a_share_of_a_gate_and_the_others_the_rest() -> None:
    gate = Gate("max_calls", 8, 250, share=0.25)
    with ExitStack() as inside:
        for tenant in ("a", "a", "b", "b", "c", "c", "d"):
            inside.enter_context(gate.entered(tenant))
        with pytest.raises(Overloaded) as share, gate.entered("a"):
            pass
        inside.enter_context(gate.entered("e"))
        with pytest.raises(Overloaded) as whole, gate.entered("f"):
            pass
        assert (gate.taken, gate.tenants) == (8, 5)
    assert (gate.taken, gate.tenants) == (0, 0)
    assert share.value.metadata == {"bound": "max_calls_per_tenant", "limit": "2"}
    assert whole.value.metadata == {"bound": "max_calls", "limit": "8"}
    assert share.value.retry_after_ms == whole.value.retry_after_ms == 250


def test_a_share_is_one_at_least_and_free_again_after_a_failure() -> None:
    gate = Gate("max_calls", 2, 250, share=0.25)
    for _ in range(2):
        with pytest.raises(ValueError, match="x"), gate.entered("a"):
            raise ValueError("x")
    assert (gate.taken, gate.tenants) == (0, 0)


def test_batch_turns_leave_the_last_places_to_interactive_ones() -> None:
    gate = Gate("max_streams", 8, 250, share=0.5, batch_share=0.5)
    with ExitStack() as inside:

        def enter(tenant: str, *, batch: bool) -> None:
            inside.enter_context(gate.entered(tenant, batch=batch))

        def refused(tenant: str, *, batch: bool) -> dict[str, str]:
            with pytest.raises(Overloaded) as caught, gate.entered(tenant, batch=batch):
                pass
            assert caught.value.retry_after_ms == 250
            return dict(caught.value.metadata)

        for _ in range(2):
            enter("a", batch=True)
        assert refused("a", batch=True) == {"bound": "max_streams_per_tenant", "limit": "2"}
        enter("a", batch=False)  # a tenant's batch turns leave room for its own, too
        enter("b", batch=False)
        assert refused("c", batch=True) == {"bound": "max_streams", "limit": "4"}
        for tenant in "abbb":
            enter(tenant, batch=False)
        assert refused("c", batch=False) == {"bound": "max_streams", "limit": "8"}
    assert (gate.taken, gate.tenants) == (0, 0)


def test_a_gate_of_one_place_has_it_for_batch_turns_too() -> None:
    gate = Gate("max_streams", 1, 250, share=0.5, batch_share=0.5)
    with gate.entered("a", batch=True):
        assert gate.taken == 1


@pytest.mark.parametrize("share", ["share_per_tenant", "batch_share"])
def test_a_share_of_more_than_the_whole_is_refused_at_start(share: str) -> None:
    with pytest.raises(ValueError, match=share):
        GatewayConfig(admission=Admission(**{share: 1.5}))  # type: ignore[arg-type]


def test_requests_larger_than_a_message_are_refused_at_start() -> None:
    with pytest.raises(ValueError, match="max_request_bytes must be at most"):
        GatewayConfig(admission=Admission(max_message_bytes=1 << 20))


@simulated
async def test_a_tenant_with_its_share_of_streams_leaves_room_for_another() -> None:
    config = GatewayConfig(admission=Admission(max_streams=4))
    async with world(config=config, a=40) as w:
        mine = [await w.open(f"r{i}", tenant="mallory") for i in range(2)]
        other = await w.open("r", tenant="victim")
        held = w.turn(mine[0], tenant="mallory")
        await anyio.sleep(0.1)
        refused = await w.finish(w.turn(mine[1], tenant="mallory"))
        served = await w.finish(w.turn(other, tenant="victim"))
        assert isinstance(refused.error, Overloaded)
        assert refused.error.metadata["bound"] == "max_streams_per_tenant"
        assert refused.error.retry_after_ms
        assert served.error is None
        assert (await w.finish(held)).error is None


@simulated
async def test_batch_streams_leave_room_for_interactive_ones() -> None:
    config = GatewayConfig(admission=Admission(max_streams=2, share_per_tenant=1, batch_share=0.5))
    async with world(config=config, a=40) as w:
        first, second, third = [await w.open(f"r{i}") for i in range(3)]
        held = w.turn(first, priority=pb.TURN_PRIORITY_BATCH)
        await anyio.sleep(0.1)
        refused = await w.finish(w.turn(second, priority=pb.TURN_PRIORITY_BATCH))
        served = await w.finish(w.turn(third, priority=pb.TURN_PRIORITY_INTERACTIVE))
        assert isinstance(refused.error, Overloaded)
        assert refused.error.retry_after_ms
        assert served.error is None
        assert (await w.finish(held)).error is None
        assert (await w.finish(w.turn(second, priority=pb.TURN_PRIORITY_BATCH))).error is None


@simulated
async def test_who_attaches_to_a_batch_turn_is_let_in_where_a_new_one_is_refused() -> None:
    config = GatewayConfig(admission=Admission(max_streams=4, share_per_tenant=1, batch_share=0.5))
    batch = pb.TURN_PRIORITY_BATCH
    async with world(config=config, a=40) as w:
        accepted, other, third, fresh = [await w.open(f"r{i}") for i in range(4)]
        turn = w.turn(accepted, "t1", priority=batch)
        await anyio.sleep(0.1)
        assert turn.tokens
        held = [w.turn(other, "t2"), w.turn(third, "t3")]
        await anyio.sleep(0.1)
        assert isinstance((await w.finish(w.turn(fresh, "t4", priority=batch))).error, Overloaded)
        again = await w.finish(w.turn(accepted, "t1", attach_only=True, priority=batch))
        assert again.error is None
        assert again.tokens
        for client in (turn, *held):
            assert (await w.finish(client)).error is None


@simulated
async def test_a_batch_turn_finds_no_place_where_an_interactive_one_does() -> None:
    half = ReplicaLoad(free_pages=4096, prefill_tokens_per_s=2000.0, running_turns=8)
    async with world(a=4) as w:
        replica = w.fleet.replicas["a"]
        replica.load = replace(half, queued_turns=4)
        await anyio.sleep(1.5)
        refused = await w.finish(w.turn(await w.open("r1"), priority=pb.TURN_PRIORITY_BATCH))
        assert isinstance(refused.error, Overloaded)
        assert refused.error.retry_after_ms
        assert not replica.dispatches
        assert (await w.finish(w.turn(await w.open("r2")))).error is None
        replica.load = replace(half, queued_turns=3)
        await anyio.sleep(1.5)
        served = await w.finish(w.turn(await w.open("r1"), priority=pb.TURN_PRIORITY_BATCH))
        assert served.error is None


@simulated
async def test_an_accepted_batch_turn_is_taken_over_where_a_new_one_would_be_refused() -> None:
    async with world(a=400) as w:
        session_id = await w.open()
        client = w.turn(session_id, priority=pb.TURN_PRIORITY_BATCH)
        await anyio.sleep(0.2)
        assert client.tokens
        crowded = await w.replica("b", output_tokens=400)
        crowded.load = ReplicaLoad(
            free_pages=4096, prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=4
        )
        await anyio.sleep(1.0)
        assert not client.done
        calls = w.calls_to_store("get_session", "take")
        await w.kill_owner(session_id)
        calls.clear()
        await w.finish(client)
        assert client.error is None
        assert len(crowded.dispatches) == 1
        assert calls[0] == "take", "nothing had to be read to know that it is accepted"
        await w.check_gapless(client, session_id)


@simulated
async def test_who_attaches_to_an_accepted_turn_waits_for_a_place_as_who_began_it_does() -> None:
    full = ReplicaLoad(
        free_pages=4096, prefill_tokens_per_s=2000.0, running_turns=8, queued_turns=8
    )
    async with world(a=400) as w:
        session_id = await w.open()
        first = w.turn(session_id)
        await anyio.sleep(0.2)
        assert first.tokens
        other = await w.replica("b", output_tokens=400)
        other.load = full
        await anyio.sleep(1.0)
        assert not first.done
        await w.kill_owner(session_id)
        await anyio.sleep(10.0)  # the owner is DOWN, and there is no place but its
        again = w.turn(session_id, attach_only=True)
        await anyio.sleep(2.0)
        assert not other.dispatches
        assert again.error is None
        other.load = replace(full, queued_turns=0)
        for client in (first, again):
            assert (await w.finish(client)).error is None
            await w.check_gapless(client, session_id)


@simulated
async def test_a_tenant_with_its_bound_of_sessions_opens_and_forks_no_more() -> None:
    config = GatewayConfig(quotas={"*": TenantQuota(sessions=1)})
    async with world(config=config, a=4) as w:
        sessions = w.gateway.sessions
        session_id = await w.open("r1")
        fork = session_pb2.ForkSessionRequest(session_id=session_id, request_id="f")
        for call in (lambda: w.open("r2"), lambda: sessions.fork(TENANT, fork)):
            with pytest.raises(Overloaded, match="quota sessions is 1") as refused:
                await call()
            assert refused.value.retry_after_ms
            assert "Close" in refused.value.hint
        assert await w.open("r1") == session_id
        await w.open("r1", tenant="other")
        close = session_pb2.CloseSessionRequest(session_id=session_id, purge=True)
        await sessions.close(TENANT, close)
        await w.open("r2")
