"""Every script of the store once, with its effect checked: a short contract for many servers."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from statestore.ports import (
    Appended,
    SessionWritten,
    TurnBegun,
    TurnEnded,
    TurnResumed,
)
from statestore.records import (
    ReplicaRegistration,
    SessionState,
    StoreLimits,
    TenantUsage,
    UsageSum,
)
from statestore.redis_store import RedisStore
from statestore.scripts import script_names
from tests.support.owners import (
    STOP,
    TENANT,
    A,
    B,
    Owner,
    check_whole,
    known_turns,
    new_session,
    session_of,
    taken,
)
from tests.support.stores import CountingExecutor

LIMITS = StoreLimits(index_grace_ms=300, replica_record_ttl_ms=600_000)


async def visit_every_script(executor: CountingExecutor) -> None:
    """On a server that holds nothing of Sessile's."""
    store = RedisStore(executor, limits=LIMITS)
    await _turns(store)
    await _moves_and_ends(store)
    await _fleet(store)
    await _usage(store)
    ran = {name for trip in executor.round_trips for name in trip}
    assert ran == set(script_names())


async def _turns(store: RedisStore) -> None:
    assert await store.find_or_admit(TENANT, "ses_f", 10) is None
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4, 5])
    await owner.begun("t2")
    assert await owner.write(7) == Appended(owner.head)
    # As if the server had lost the last token.
    stored = owner.head
    owner.tokens.append(8)
    repair = owner.repair(
        stored,
        owner.epoch,
        keep=stored.length,
        turns=(await known_turns(store))[1:],
        active="t2",
        turn_index=1,
    )
    assert await store.repair(repair) == Appended(owner.head)
    successor = await taken(store, owner)
    assert isinstance(await store.resume_turn("ses_f", successor.epoch, "t2"), TurnResumed)
    assert await successor.write(9, commit=STOP) == Appended(successor.head)
    await check_whole(store, successor)
    await successor.begun("t3")
    assert isinstance(await store.cancel_turn("ses_f", "t3"), TurnEnded)
    assert await store.tenant_salt(TENANT) == await store.tenant_salt(TENANT)


async def _moves_and_ends(store: RedisStore) -> None:
    session = await session_of(store, "ses_f")
    assert session.owner is not None
    epoch = session.owner.epoch
    assert isinstance(await store.begin_migration("ses_f", epoch, "m1", A, 60_000), SessionWritten)
    await store.abort_migration("ses_f", "m1")
    assert isinstance(await store.begin_migration("ses_f", epoch, "m2", A, 60_000), SessionWritten)
    moved = await store.switch_migration("ses_f", epoch, "m2", session.head, None, b"switched")
    assert isinstance(moved, SessionWritten)
    forked = await store.fork("ses_f", "ses_f.1", 1, ())
    assert isinstance(forked, SessionWritten)
    assert forked.session.turn_index == 1
    page = await store.list_sessions(TENANT, "", 10)
    assert {s.session_id for s in page.sessions} == {"ses_f", "ses_f.1"}
    assert await store.sessions_of(A, 10) == ("ses_f",)
    assert await store.sessions_of(B, 10) == ()
    assert isinstance(await store.suspend("ses_f"), SessionWritten)
    assert (await session_of(store, "ses_f")).state is SessionState.SUSPENDED
    assert isinstance(await store.close("ses_f", 0), SessionWritten)  # purged at once
    assert isinstance(await store.close("ses_f.1", 1), SessionWritten)
    with anyio.fail_after(10):
        while "ses_f.1" not in (await store.sweep(10)).sessions_purged:
            await anyio.lowlevel.checkpoint()
    assert await store.get_session("ses_f") is None
    again = await store.open_session(new_session("ses_g"))
    assert isinstance(again, SessionWritten)


async def _usage(store: RedisStore) -> None:
    replica = await store.register_replica(ReplicaRegistration("r2", "of usage"))
    await store.heartbeat(replica, 1, "load", {TENANT: UsageSum(1, 7)})
    assert await store.read_usage(TENANT, 100) == TenantUsage(93, 7)
    counted, cursor = await store.count_ledgers(TENANT, "", 10)
    assert (counted > 0, cursor) == (True, "")
    await store.settle_usage(TENANT, 7, counted)
    assert (await store.read_usage(TENANT, 0)).ledger_tokens == counted
    await store.note_usage(TENANT, age_ms=60_000)
    assert await store.uncounted_tenant(1_000) == TENANT


async def _fleet(store: RedisStore) -> None:
    old = await store.register_replica(ReplicaRegistration("r1", "old"))
    new = await store.register_replica(ReplicaRegistration("r1", "new"))
    assert await store.heartbeat(new, 1, "load") in (0, 1)
    assert await store.heartbeat(old, 2, "late") is None
    assert await store.set_draining(new, True)
    (record,) = await store.fleet()  # also drops the index of the old one
    assert (record.ref, record.draining) == (new, True)
    await store.deregister_replica(new)
    lease = await store.acquire_lease("duty", "g1", 60_000)
    assert lease is not None
    assert await store.acquire_lease("duty", "g2", 60_000) is None
    await store.release_lease(lease)
    assert await store.acquire_lease("duty", "g2", 60_000) is not None
    owner = await Owner.of(store, "ses_h")
    assert isinstance(await owner.begin(), TurnBegun)
