"""What tenants use: sums that replicas report count once, and a count sets them right."""

from __future__ import annotations

import pytest

from statestore.records import ReplicaRef, TenantUsage, UsageSum
from statestore.redis_store import RedisStore
from tests.support.owners import TENANT, Owner, session_of
from tests.support.stores import ANSWERING, Backend, raw

pytestmark = pytest.mark.anyio

A1, A2, B1 = ReplicaRef("a", 1), ReplicaRef("a", 2), ReplicaRef("b", 1)


async def told(store: RedisStore, ref: ReplicaRef, number: int, tokens: int) -> int:
    """The tenant's ledger tokens after a report."""
    await store.heartbeat(ref, 1, "{}", {TENANT: UsageSum(number, tokens)})
    return (await store.read_usage(TENANT, 0)).ledger_tokens


async def test_sums_of_replicas_add_up_and_count_once(store: RedisStore) -> None:
    assert await told(store, A1, 1, 10) == 10
    assert await told(store, A1, 1, 10) == 10
    assert await told(store, A1, 1, 25) == 25
    assert await told(store, B1, 1, 5) == 30
    assert await told(store, A1, 1, 20) == 30, "a report that came late"
    assert (await store.read_usage("other", 0)).ledger_tokens == 0


async def test_a_sum_begun_anew_counts_from_nothing(store: RedisStore) -> None:
    assert await told(store, A1, 1, 10) == 10
    assert await told(store, A1, 2, 3) == 13
    assert await told(store, A1, 1, 50) == 13, "of the sum before"
    assert await told(store, A2, 1, 4) == 17, "the replica was started again"
    assert await told(store, A1, 9, 9) == 17, "by its earlier process"


async def test_a_report_that_the_store_lost_is_made_up_for_by_the_next(
    store: RedisStore, backend: Backend
) -> None:
    await told(store, A1, 1, 10)
    saved = await backend.save()
    await told(store, A1, 1, 30)
    await backend.roll_back(saved)
    assert await told(store, A1, 1, 35) == 35


@ANSWERING
async def test_what_is_spent_leaves_the_minute_also_below_nothing(
    store: RedisStore, backend: Backend
) -> None:
    assert await store.read_usage(TENANT, 1_000) == TenantUsage(1_000, 0)
    await told(store, A1, 1, 400)
    left = (await store.read_usage(TENANT, 1_000)).minute_tokens
    assert 600 <= left < 700
    await told(store, A1, 1, 5_400)
    left = (await store.read_usage(TENANT, 1_000)).minute_tokens
    assert -4_400 <= left < -4_200
    await raw(backend, "sessile:usage:" + TENANT, "HINCRBY", "at", -120_000_000)
    paid = (await store.read_usage(TENANT, 1_000)).minute_tokens
    assert 2_000 <= paid - left < 2_200, "two minutes' tokens came in"
    await raw(backend, "sessile:usage:" + TENANT, "HINCRBY", "at", -9_000_000_000)
    assert (await store.read_usage(TENANT, 1_000)).minute_tokens == 1_000, "a minute's at most"


async def test_a_smaller_quota_holds_at_once(store: RedisStore) -> None:
    assert (await store.read_usage(TENANT, 1_000)).minute_tokens == 1_000
    assert (await store.read_usage(TENANT, 100)).minute_tokens == 100


async def counted(store: RedisStore, page: int = 100) -> int:
    total, cursor = await store.count_ledgers(TENANT, "", page)
    while cursor:
        more, cursor = await store.count_ledgers(TENANT, cursor, page)
        total += more
    return total


async def test_a_count_is_of_what_the_ledgers_hold_themselves(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [7, 8, 9])
    session = await session_of(store, "ses_f")
    assert session.head.length == 6
    await store.fork(session.session_id, "ses_f.c", 0, ())
    assert await counted(store) == session.head.length
    assert await counted(store, page=1) == session.head.length
    await store.close(session.session_id, 0)
    await store.close("ses_f.c", 0)
    assert await counted(store) == 0


async def test_a_count_sets_the_usage_right_and_keeps_what_came_meanwhile(
    store: RedisStore,
) -> None:
    before = await told(store, A1, 1, 100)
    await told(store, A1, 1, 130)
    await store.settle_usage(TENANT, before, 40)
    assert (await store.read_usage(TENANT, 0)).ledger_tokens == 70
    await store.settle_usage(TENANT, 500, 0)
    assert (await store.read_usage(TENANT, 0)).ledger_tokens == 0, "never below nothing"


@ANSWERING
async def test_tenants_are_counted_in_turn_and_who_asks_is_next(
    store: RedisStore, backend: Backend
) -> None:
    for tenant in ("x", "y"):
        await store.note_usage(tenant)
    assert await store.uncounted_tenant(600_000) is None
    await store.note_usage("y", age_ms=600_000)
    assert await store.uncounted_tenant(600_000) == "y"
    assert await store.uncounted_tenant(600_000) is None
    for tenant, score in (("x", 1), ("y", 2)):
        await raw(backend, "sessile:usage-tenants", "ZADD", score, tenant)
    await store.note_usage("x")
    assert [await store.uncounted_tenant(600_000) for _ in range(3)] == ["x", "y", None]
