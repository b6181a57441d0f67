"""Bounds of a gateway: what one tenant has open does not keep another from opening."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import pytest
from sessile.v1 import session_pb2

from gateway.app.admission import Gate
from gateway.config import Admission, GatewayConfig
from gateway.core.errors import Overloaded
from gateway.core.quotas import TenantQuota
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


def test_a_share_of_more_than_the_whole_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="share_per_tenant"):
        GatewayConfig(admission=Admission(share_per_tenant=1.5))


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
