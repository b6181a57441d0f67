"""Quotas of tenants over all gateways, in whole worlds of gateways and replicas."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import pytest
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from gateway.app.gateway import GatewayApp
from gateway.config import Admission, GatewayConfig, Times
from gateway.core.errors import MessageTooLarge, QuotaExceeded, SessileError
from gateway.core.quotas import TenantQuota, quota_of, turn_exceeds
from loadtest.simulation.loop import run
from loadtest.simulation.world import World, world
from statestore.records import TenantUsage
from tests.support.served_world import turn_request

TENANT, OTHER = "acme", "other"


@dataclass
class Tenants:
    """Two gateways over two replicas, called as their servers would."""

    world: World

    def app(self, gateway: str) -> GatewayApp:
        return self.world.gateways[gateway].app

    async def open(self, name: str, tenant: str = TENANT) -> str:
        request = session_pb2.OpenSessionRequest(request_id=name)
        answer = await self.app("g").sessions.open(tenant, request)
        return answer.session.session_id

    async def turn(
        self,
        session_id: str,
        turn_id: str = "t",
        *,
        tenant: str = TENANT,
        gateway: str = "g",
        patience_s: float = 60.0,
        tokens: int = 8,
    ) -> pb.TurnFinished | SessileError | None:
        """Its end, its refusal, or None if it runs on while the client has left."""
        heard: list[bytes] = []

        async def sink(message: bytes) -> None:
            heard.append(message)

        request = turn_request(session_id, turn_id, max_tokens=tokens, ignore_eos=True)
        with anyio.move_on_after(patience_s) as scope:
            try:
                await self.app(gateway).turns.run(tenant, request, 120.0, sink)
            except SessileError as error:
                return error
        if scope.cancelled_caught:
            return None
        return pb.TurnStream.FromString(b"".join(heard)).events[-1].finished

    async def ends(self, session_id: str, turn_id: str = "t", **options: object) -> None:
        """The turn is served."""
        end = await self.turn(session_id, turn_id, **options)  # type: ignore[arg-type]
        assert isinstance(end, pb.TurnFinished), end
        assert end.status == pb.TURN_STATUS_COMMITTED, end

    async def refused(
        self, session_id: str, turn_id: str = "t", **options: object
    ) -> QuotaExceeded:
        """The turn is refused for a quota."""
        end = await self.turn(session_id, turn_id, **options)  # type: ignore[arg-type]
        assert isinstance(end, QuotaExceeded), end
        assert end.retry_after_ms
        return end

    async def close(self, session_id: str) -> None:
        request = session_pb2.CloseSessionRequest(session_id=session_id, purge=True)
        await self.app("g").sessions.close(TENANT, request)


@asynccontextmanager
async def tenants(**quota: int) -> AsyncIterator[Tenants]:
    config = GatewayConfig(quotas={TENANT: TenantQuota(**quota)}, times=Times(recount_ask_s=1.0))
    async with world(random.Random(3), gateway_config=config) as made:
        for name in ("a", "b"):
            await made.start_replica(name)
        for name in ("g", "h"):
            made.start_gateway(name)
        await anyio.sleep(1.5)
        yield Tenants(made)


def simulated(test: Callable[[], object]) -> Callable[[], None]:
    def run_test() -> None:
        run(test)  # type: ignore[arg-type]

    run_test.__name__ = test.__name__
    return run_test


@simulated
async def test_turns_that_run_count_through_every_gateway_and_end_with_their_replica() -> None:
    async with tenants(running_turns=2) as t:
        ids = [await t.open(f"s{i}") for i in range(4)]
        for session_id in ids[:2]:
            assert await t.turn(session_id, tokens=400, patience_s=0.5) is None
        await anyio.sleep(1.5)
        for gateway in ("g", "h"):
            refused = await t.refused(ids[2], gateway=gateway)
            assert refused.metadata == {"quota": "running_turns", "limit": "2", "used": "2"}
            assert "cancel one" in refused.hint
        # Whoever has a turn that runs attaches to it, and other tenants run theirs.
        assert await t.turn(ids[0], tokens=400, patience_s=0.5, gateway="h") is None
        await t.ends(await t.open("o", OTHER), tenant=OTHER)
        # A counter would leak here: both replicas die, and so do the turns in time.
        for name in ("a", "b"):
            t.world.kill(t.world.replicas[name])
        await t.world.start_replica("c")
        await anyio.sleep(5)
        await t.ends(ids[2], gateway="h")


@simulated
async def test_a_burst_through_one_gateway_is_held_before_any_heartbeat() -> None:
    async with tenants(running_turns=3) as t:
        ids = [await t.open(f"s{i}") for i in range(12)]
        ends: list[object] = []

        async def one(session_id: str) -> None:
            ends.append(await t.turn(session_id))

        async with anyio.create_task_group() as tasks:
            for session_id in ids:
                tasks.start_soon(one, session_id)
        refused = [end for end in ends if isinstance(end, QuotaExceeded)]
        assert len(refused) == 9, ends
        assert not t.app("g").quotas._here


@simulated
async def test_tokens_of_a_minute_are_paid_for_and_then_turns_begin_again() -> None:
    async with tenants(tokens_per_minute=600) as t:
        session_id = await t.open("s")
        begun = 0
        while not isinstance(
            end := await t.turn(session_id, f"t{begun}", tokens=100), SessileError
        ):
            begun += 1
            await anyio.sleep(1.5)  # a report, and a look at it
        assert isinstance(end, QuotaExceeded)
        assert 5 <= begun <= 8, "600 tokens at once, 10 a second, 100 and input each"
        assert end.metadata["quota"] == "tokens_per_minute"
        assert end.retry_after_ms is not None
        await t.refused(await t.open("s2"), gateway="h")
        await t.ends(session_id, "t0", tokens=100)  # replayed
        await t.ends(await t.open("o", OTHER), tenant=OTHER)
        await anyio.sleep(end.retry_after_ms / 1000 + 1)
        await t.ends(session_id, f"t{begun}", tokens=100)


@simulated
async def test_over_a_long_time_a_tenant_gets_its_tokens_and_no_more() -> None:
    async with tenants(tokens_per_minute=600) as t:
        ids = [await t.open(f"s{i}") for i in range(4)]
        began = anyio.current_time()

        async def busy(session_id: str, gateway: str) -> None:
            number = 0
            while anyio.current_time() - began < 240:
                end = await t.turn(session_id, f"t{number}", gateway=gateway, tokens=50)
                if isinstance(end, QuotaExceeded):
                    await anyio.sleep((end.retry_after_ms or 0) / 1000)
                else:
                    number += 1

        async with anyio.create_task_group() as tasks:
            for index, session_id in enumerate(ids):
                tasks.start_soon(busy, session_id, "gh"[index % 2])
        written = 0
        for session_id in ids:
            session = await t.world.store.get_session(session_id)
            assert session is not None
            written += session.head.length
        # Four minutes and the full bucket at first; four turns at once may go past it.
        assert 0.85 * 5 * 600 <= written <= 5 * 600 + 4 * 2 * 60, written


@simulated
async def test_ledger_tokens_are_refused_past_the_quota_and_free_after_a_purge() -> None:
    async with tenants(ledger_tokens=300) as t:
        first, second = await t.open("s1"), await t.open("s2")
        for number in range(3):
            await t.ends(first, f"t{number}", tokens=100)
        await anyio.sleep(1.5)
        refused = await t.refused(second)
        assert refused.metadata["quota"] == "ledger_tokens"
        assert "purge" in refused.hint
        await t.close(first)
        await t.refused(second, gateway="h")
        await anyio.sleep(4)
        await t.ends(second)


@simulated
async def test_what_a_replica_had_not_reported_when_it_died_is_counted() -> None:
    async with tenants(ledger_tokens=300) as t:
        session_id = await t.open("s")
        await t.ends(session_id, "t0", tokens=200)
        for name in ("a", "b"):
            t.world.kill(t.world.replicas[name])
        session = await t.world.store.get_session(session_id)
        assert session is not None
        told = (await t.world.store.read_usage(TENANT, 0)).ledger_tokens
        assert told < session.head.length, "the replica was killed before its report"
        await t.world.store.note_usage(TENANT, 600_000)
        await anyio.sleep(4)
        told = (await t.world.store.read_usage(TENANT, 0)).ledger_tokens
        assert told == session.head.length


@simulated
async def test_a_request_over_the_tenants_bytes_is_refused_where_a_repeat_would_not_help() -> None:
    async with tenants(message_bytes=1000) as t:
        session_id = await t.open("s")
        request = turn_request(session_id, "t")
        request.messages[0].content = "x" * 1000
        sessions, turns = t.app("g").sessions, t.app("g").turns

        async def sink(message: bytes) -> None:
            del message

        opening = session_pb2.OpenSessionRequest(request_id="r", messages=request.messages)
        with pytest.raises(MessageTooLarge, match="message_bytes is 1000") as refused:
            await turns.run(TENANT, request, 60.0, sink)
        assert refused.value.retry_after_ms is None
        with pytest.raises(MessageTooLarge):
            await sessions.open(TENANT, opening)
        await sessions.open(OTHER, opening)
        await t.ends(session_id)


def test_a_tenant_has_its_own_quota_or_everybodys() -> None:
    own, every = TenantQuota(sessions=1), TenantQuota(sessions=2)
    assert quota_of({"a": own, "*": every}, "a") is own
    assert quota_of({"a": own, "*": every}, "b") is every
    assert quota_of({"a": own}, "b") == TenantQuota()


@pytest.mark.parametrize(
    ("usage", "quota", "wait_ms"),
    [
        (TenantUsage(1, 0), None, None),
        (TenantUsage(0, 0), "tokens_per_minute", 100),
        (TenantUsage(-599, 0), "tokens_per_minute", 60_000),
        (TenantUsage(-(10**9), 0), "tokens_per_minute", 3_600_000),
        (TenantUsage(600, 1000), "ledger_tokens", 5_000),
        (TenantUsage(600, 999), None, None),
    ],
)
def test_the_wait_is_as_long_as_the_debt(
    usage: TenantUsage, quota: str | None, wait_ms: int | None
) -> None:
    found = turn_exceeds(TenantQuota(tokens_per_minute=600, ledger_tokens=1000), 0, usage)
    assert (found and found.quota, found and found.retry_after_ms) == (quota, wait_ms)


@pytest.mark.parametrize(
    ("quotas", "complaint"),
    [
        ({"a b": TenantQuota()}, "is no tenant"),
        ({"a": TenantQuota(message_bytes=6 << 20)}, "message_bytes must be at most"),
    ],
)
def test_quotas_that_cannot_hold_are_refused_at_start(
    quotas: dict[str, TenantQuota], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        GatewayConfig(quotas=quotas, admission=Admission())
    with pytest.raises(ValueError, match="running_turns must not be negative"):
        TenantQuota(running_turns=-1)
