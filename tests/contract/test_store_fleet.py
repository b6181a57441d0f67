"""Replicas, leases and salts."""

from __future__ import annotations

from typing import Any

import pytest

from statestore import keys
from statestore.records import Lease, ReplicaRecord, ReplicaRegistration, StoreLimits
from statestore.redis_store import RedisStore
from statestore.script_runner import script_call
from tests.support.owners import Owner
from tests.support.stores import ANSWERING, Backend, raw, store_on

pytestmark = pytest.mark.anyio


async def test_a_registered_replica_is_in_the_fleet(store: RedisStore) -> None:
    assert await store.fleet() == ()
    two = await store.register_replica(ReplicaRegistration("r:2", '{"name":"zwölf"}'))
    one = await store.register_replica(ReplicaRegistration("r:1", "{}"))
    assert await store.fleet() == (
        ReplicaRecord(one, "{}", 0, "", draining=False, gone=False),
        ReplicaRecord(two, '{"name":"zwölf"}', 0, "", draining=False, gone=False),
    )


async def test_heartbeats_replace_counter_and_load(store: RedisStore) -> None:
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    # A repeat after a lost answer finds its own.
    assert await store.heartbeat(ref, 1, '{"a":1}') in (0, 1)
    assert await store.heartbeat(ref, 2, '{"a":2}') in (1, 2)
    (record,) = await store.fleet()
    assert (record.heartbeat, record.load) == (2, '{"a":2}')


async def test_a_heartbeat_that_comes_late_changes_nothing(store: RedisStore) -> None:
    """Observers would see a counter go back, and take the next one for silence (P9)."""
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await store.heartbeat(ref, 3, "new")
    assert await store.heartbeat(ref, 2, "old") == 3
    (record,) = await store.fleet()
    assert (record.heartbeat, record.load) == (3, "new")


async def test_a_restarted_replica_replaces_its_earlier_incarnation(store: RedisStore) -> None:
    old = await store.register_replica(ReplicaRegistration("r1", "old"))
    await store.set_draining(old, True)
    new = await store.register_replica(ReplicaRegistration("r1", "new"))
    assert new.incarnation > old.incarnation
    assert await store.heartbeat(old, 9, "late") is None
    assert not await store.set_draining(old, True)
    await store.deregister_replica(old)
    assert await store.fleet() == (ReplicaRecord(new, "new", 0, "", draining=False, gone=False),)


async def test_draining_can_be_set_and_taken_back(store: RedisStore) -> None:
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    for draining in (True, False):
        assert await store.set_draining(ref, draining)
        assert [record.draining for record in await store.fleet()] == [draining]


async def test_a_replica_that_the_store_forgot_still_drains(backend: Backend) -> None:
    store = store_on(backend)
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    assert await store.set_draining(ref, True)
    assert await store_on(backend, StoreLimits(replica_record_ttl_ms=-1)).fleet() == ()
    assert await store.heartbeat(ref, 1, "{}") is not None
    assert [(record.ref, record.draining) for record in await store.fleet()] == [(ref, True)]


async def test_a_replica_that_says_good_bye_is_gone(store: RedisStore) -> None:
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await store.deregister_replica(ref)
    assert [record.gone for record in await store.fleet()] == [True]


async def test_a_replica_silent_for_long_is_forgotten(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(replica_record_ttl_ms=-1))
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    assert await store.fleet() == ()
    assert "sessile:fleet" not in await backend.keys()
    # It was only slow: its next heartbeat brings it back.
    assert await store.heartbeat(ref, 1, "{}") is not None
    assert [record.ref for record in await store_on(backend).fleet()] == [ref]


async def test_a_heartbeat_of_an_unknown_replica_does_not_invent_it(store: RedisStore) -> None:
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await store.deregister_replica(ref)
    other = type(ref)("r2", ref.incarnation)
    assert await store.heartbeat(other, 1, "{}") is not None
    assert [record.ref for record in await store.fleet()] == [ref]


async def test_details_of_a_replica_are_bounded(store: RedisStore) -> None:
    with pytest.raises(ValueError, match="8192"):
        await store.register_replica(ReplicaRegistration("r1", "x" * 8193))


async def test_a_lease_has_one_holder_who_can_renew_it(store: RedisStore) -> None:
    lease = await store.acquire_lease("sweeper", "g1", 60_000)
    assert lease is not None
    assert (lease.name, lease.holder) == ("sweeper", "g1")
    assert await store.acquire_lease("sweeper", "g1", 60_000) == lease
    assert await store.acquire_lease("sweeper", "g2", 60_000) is None
    assert await store.acquire_lease("rebalancer", "g2", 60_000) is not None


async def test_a_released_or_expired_lease_passes_on_with_a_greater_token(
    store: RedisStore,
) -> None:
    first = await store.acquire_lease("sweeper", "g1", 60_000)
    assert first is not None
    await store.release_lease(Lease("sweeper", "g1", first.token + 1))
    assert await store.acquire_lease("sweeper", "g2", 0) is None
    await store.release_lease(first)
    second = await store.acquire_lease("sweeper", "g2", 0)
    assert second is not None
    third = await store.acquire_lease("sweeper", "g3", 60_000)
    assert third is not None
    assert first.token < second.token < third.token


async def test_a_tenant_has_one_salt_for_good(store: RedisStore) -> None:
    salt = await store.tenant_salt("acme")
    assert len(salt) == 32
    assert await store.tenant_salt("acme") == salt
    assert await store.tenant_salt("other") != salt


@ANSWERING
async def test_the_index_of_a_replica_process_goes_with_it(backend: Backend) -> None:
    store = store_on(backend)
    old = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await Owner.of(store, "ses_f", old)
    await store.fleet()
    assert keys.replica_index_key(old) in await backend.keys()
    new = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await Owner.of(store, "ses_g", new)
    await store.fleet()
    assert keys.replica_index_key(old) not in await backend.keys()
    assert await store.sessions_of(new, 10) == ("ses_g",)
    forgetful = store_on(backend, StoreLimits(replica_record_ttl_ms=-1))
    assert await forgetful.fleet() == ()
    assert not any("replica-sessions" in key for key in await backend.keys())
    assert keys.FLEET not in await backend.keys()


@pytest.mark.parametrize("field", ["inc", "details", "beat", "load", "seen", "replaced"])
async def test_a_damaged_replica_hides_no_other_and_comes_back(
    backend: Backend, field: str
) -> None:
    store = store_on(backend)
    one = await store.register_replica(ReplicaRegistration("r1", "{}"))
    two = await store.register_replica(ReplicaRegistration("r2", "{}"))
    await raw(backend, keys.FLEET, "HSET", f"{field}:r1", b"\xff")
    assert two in [record.ref for record in await store.fleet()]
    if field == "details":  # only said at the registration
        await store.register_replica(ReplicaRegistration("r1", "{}"))
    else:
        assert await store.heartbeat(one, 1, "{}") is not None
    assert [record.ref.replica_id for record in await store.fleet()] == ["r1", "r2"]


@ANSWERING
async def test_a_registration_is_not_written_back_over_a_newer_process(backend: Backend) -> None:
    """The store loses a registration, its process is replaced, and only then writes it back."""
    store = store_on(backend)
    before = await backend.save()
    old = await store.register_replica(ReplicaRegistration("r1", "old"))
    await backend.roll_back(before)
    replace = store_on(backend)
    executor = backend.executor

    class ReplacedMeanwhile:
        async def execute(self, calls: Any, timeout_s: float) -> Any:
            found = await executor.execute(calls, timeout_s)
            if calls[0].script.name == "heartbeat" and found[0] == [b"unknown"]:
                await replace.register_replica(ReplicaRegistration("r1", "new"))
            return found

        async def aclose(self) -> None: ...

    slow = RedisStore(ReplacedMeanwhile())
    slow._registered = store._registered
    assert await slow.heartbeat(old, 1, "{}") is None
    assert [record.details for record in await store.fleet()] == ["new"]


@ANSWERING
async def test_a_registration_written_back_twice_keeps_the_index(backend: Backend) -> None:
    store = store_on(backend)
    ref = await store.register_replica(ReplicaRegistration("r1", "{}"))
    await Owner.of(store, "ses_f", ref)
    again = script_call("register", [keys.FLEET], ["r1", "{}", ref.incarnation, 0])
    await backend.executor.execute([again], 5.0)
    await store.fleet()
    assert await store.sessions_of(ref, 10) == ("ses_f",)
