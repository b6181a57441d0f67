"""Nothing of a session stays where it has no business, even if nobody told the replica."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import anyio
import pytest
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from gateway.core import errors
from loadtest.simulation.redis import Fault
from statestore.digest import RollingDigest
from statestore.executor import ScriptCall
from statestore.keys import session_key
from statestore.ports import JournalPort, SessionWritten
from statestore.records import Session
from tests.support.replica_world import (
    SESSION,
    TENANT,
    Heard,
    RunningReplica,
    World,
    in_virtual_time,
    listen,
    world,
)
from workers import service
from workers.residency import Residency, ResidentSession
from workers.service import RECONCILE_S

SOON = 1.0
LATER = RECONCILE_S + SOON


async def suspend(w: World) -> None:
    assert isinstance(await w.store.suspend(SESSION), SessionWritten)


async def close(w: World) -> None:
    assert isinstance(await w.store.close(SESSION, None), SessionWritten)


async def purge(w: World) -> None:
    assert isinstance(await w.store.close(SESSION, 1), SessionWritten)
    await anyio.sleep(0.01)
    assert (await w.store.sweep(10)).sessions_purged
    assert await w.store.get_session(SESSION) is None


END = pytest.mark.parametrize("end", [suspend, close, purge])
End = Callable[[World], Awaitable[None]]


async def block_names(w: World, replica: RunningReplica) -> list[bytes]:
    salt = await w.store.tenant_salt(TENANT)
    return replica.engine.block_hashes(salt, await w.ledger())


def check_nothing_is_left(replica: RunningReplica, names: list[bytes]) -> None:
    assert names
    assert replica.engine.resident_pages(names) == 0
    assert replica.engine.load().pinned_pages == 0
    assert replica.app._ports.residency.get(SESSION) is None
    assert replica.app.load().sessions == 0


async def owned(w: World, name: str = "r1") -> RunningReplica:
    replica = await w.start_owner(name)
    await listen(replica, await w.request(replica))
    return replica


@END
def test_an_idle_session_that_ended_in_silence_leaves_nothing(end: End) -> None:
    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            replica = await owned(w)
            names = await block_names(w, replica)
            await anyio.sleep(2 * RECONCILE_S)
            assert replica.engine.resident_pages(names) == len(names), "it is still open"
            await end(w)
            await anyio.sleep(LATER)
            check_nothing_is_left(replica, names)

    test()


@END
def test_neither_does_a_copy_at_an_earlier_owner(end: End) -> None:
    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            first, second = await owned(w), await w.start("r2")
            names = await block_names(w, first)
            moved = await w.give(second)
            epoch = types_pb2.Epoch(number=moved.epoch.number, nonce=moved.epoch.nonce)
            released = await first.app.release_session(
                pb.ReleaseSessionRequest(session_id=SESSION, epoch=epoch)
            )
            assert released.released
            await listen(second, await w.request(second, "More", "t2"))
            await anyio.sleep(LATER)
            assert first.app.load().sessions == 0
            assert first.engine.resident_pages(names) == len(names), "it may serve as cache"
            await end(w)
            await anyio.sleep(LATER)
            check_nothing_is_left(first, names)
            check_nothing_is_left(second, names)

    test()


@in_virtual_time
async def test_a_turn_that_a_close_ended_leaves_nothing() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()

        async def closed() -> None:
            if len(heard.tokens) > 5:
                await close(w)

        await listen(replica, await w.request(replica), heard, between=closed)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        await anyio.sleep(SOON)
        check_nothing_is_left(replica, await block_names(w, replica))


@in_virtual_time
async def test_a_session_taken_in_silence_is_no_load_of_its_earlier_owner() -> None:
    async with world() as w:
        first, second = await owned(w), await w.start("r2")
        await w.give(second)
        assert first.app.load().sessions == 1
        await anyio.sleep(LATER)
        assert first.app.load().sessions == 0
        assert first.engine.load().pinned_pages == 0


@in_virtual_time
async def test_what_the_store_lost_is_still_held_for_a_repair() -> None:
    async with world() as w:
        kept = w.executor.snapshot()
        replica = await w.start()
        await w.open()
        kept = w.executor.snapshot()
        await w.give(replica)
        request = await w.request(replica, "More", "t2")
        await listen(replica, await w.request(replica))
        w.executor.restore(kept)
        await anyio.sleep(LATER)
        assert replica.app.session_ids() == [SESSION]
        heard = await listen(replica, request)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        turns = await w.turns()
        assert [turn.spec.turn_id for turn in turns] == ["t1", "t2"]


@in_virtual_time
async def test_a_store_that_is_away_is_asked_again() -> None:
    async with world() as w:
        replica = await owned(w)
        names = await block_names(w, replica)
        await close(w)

        def away(call: ScriptCall) -> Fault:
            return Fault.REQUEST_LOST if call.script.name == "read_session" else Fault.NONE

        w.executor.fault = away
        await anyio.sleep(3 * RECONCILE_S)
        assert replica.app.session_ids() == [SESSION]
        w.executor.fault = lambda call: Fault.NONE
        await anyio.sleep(2 * LATER)
        check_nothing_is_left(replica, names)


def test_a_period_asks_for_a_bounded_number_of_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RECONCILE_SESSIONS", 3)

    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            replica = await w.start()
            for index in range(8):
                session_id = f"ses_{index:016d}"
                await w.open(session_id)
                await w.give(replica, session_id)
                await listen(replica, await w.request(replica, session_id=session_id))
            began, asked = anyio.current_time(), list[float]()

            def count(call: ScriptCall) -> Fault:
                if call.script.name == "read_session":
                    asked.append(anyio.current_time() - began)
                return Fault.NONE

            w.executor.fault = count
            for periods, expected in enumerate((3, 6, 8, 11), 1):
                await anyio.sleep(began + periods * LATER - anyio.current_time())
                assert len(asked) == expected

    test()


@in_virtual_time
async def test_an_import_of_a_session_that_is_closed_meanwhile_leaves_nothing() -> None:
    async with world() as w:
        first, second = await owned(w), await w.start("r2")
        names = await block_names(w, second)
        w.channel.latency_s = 2.0
        session = await w.session()
        request = pb.ImportSessionRequest(
            session_id=SESSION,
            source_endpoint="r1:1",
            source=types_pb2.ReplicaRef(
                replica_id=first.ref.replica_id, incarnation=first.ref.incarnation
            ),
            up_to=types_pb2.Position(length=session.head.length, digest=session.head.digest),
            tenant=TENANT,
        )

        async def release() -> None:
            await anyio.sleep(1.0)
            await close(w)
            epoch = types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce)
            for replica in (first, second):
                await replica.app.release_session(
                    pb.ReleaseSessionRequest(session_id=SESSION, epoch=epoch, drop_kv=True)
                )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release)
            with pytest.raises(errors.MigrationRefused, match="released"):
                await second.app.import_session(request)
        check_nothing_is_left(first, names)
        check_nothing_is_left(second, names)


@in_virtual_time
async def test_pages_of_the_least_recently_used_session_go_with_it() -> None:
    async with world() as w:
        replica = await w.start("r1", max_resident_sessions=1)
        await w.open(leading="")
        await w.give(replica)
        await listen(replica, await w.request(replica, "One of them. " * 5))
        names = await block_names(w, replica)
        other = "ses_bbbbbbbbbbbbbbbb"
        await w.open(other, leading="")
        await w.give(replica, other)
        await listen(replica, await w.request(replica, "Another one. " * 5, session_id=other))
        assert replica.app.session_ids() == [other]
        assert replica.engine.resident_pages(names) == 0


@in_virtual_time
async def test_pages_of_a_history_that_the_store_forgot_go_when_it_goes_on() -> None:
    async with world() as w:
        first, second = await owned(w), await w.start("r2")
        kept = w.executor.snapshot()
        common = await block_names(w, first)
        await listen(first, await w.request(first, "More", "t2", params={"max_tokens": 100}))
        lost = await block_names(w, first)
        w.executor.restore(kept)
        await w.give(second)
        await listen(second, await w.request(second, "Something else", "t2"))
        await w.give(first)
        await listen(first, await w.request(first, "And more", "t3"))
        assert first.engine.resident_pages(lost) == len(common) < len(lost)


@in_virtual_time
async def test_a_copy_that_is_let_go_of_while_it_is_read_on_is_there_afterwards() -> None:
    async with world() as w:
        replica = await owned(w)
        residency = replica.app._ports.residency
        held, session = residency._sessions[SESSION], await w.session()
        behind = ResidentSession(SESSION, held.salt, RollingDigest(held.salt))
        residency._sessions[SESSION] = behind

        class LettingGo:
            async def read_tokens(self, *arguments: Any) -> list[int]:
                residency.release(SESSION, drop_kv=True)
                return await w.store.read_tokens(*arguments[:3])

        store = cast(JournalPort, LettingGo())
        assert await residency.load(store, session, held.salt) is behind
        assert residency.get(SESSION) is behind


async def let_go(w: World) -> tuple[RunningReplica, Residency, Session, bytes]:
    """The owner of a session that it holds nothing of any more."""
    replica = await owned(w)
    residency = replica.app._ports.residency
    session, salt = await w.session(), await w.store.tenant_salt(TENANT)
    residency.release(SESSION, drop_kv=True)
    return replica, residency, session, salt


@in_virtual_time
async def test_an_import_replaces_nothing_of_a_turn_that_began_meanwhile() -> None:
    async with world() as w:
        replica, residency, session, salt = await let_go(w)
        second = await w.request(replica, "More", "t2")

        class Overtaken:
            async def read_tokens(self, *arguments: Any) -> list[int]:
                await listen(replica, second)
                return await w.store.read_tokens(*arguments[:3])

        store = cast(JournalPort, Overtaken())
        with pytest.raises(errors.MigrationRefused, match="owner"):
            await residency.load(store, session, salt, importing=True)
        held = residency.get(SESSION)
        assert held is not None
        assert held.tokens.tolist() == await w.ledger()
        assert replica.app.session_ids() == [SESSION]


@in_virtual_time
async def test_a_turn_goes_on_with_what_an_import_read_meanwhile() -> None:
    async with world() as w:
        _, residency, session, salt = await let_go(w)
        imported: list[ResidentSession] = []

        class Overtaken:
            async def read_tokens(self, *arguments: Any) -> list[int]:
                imported.append(await residency.load(w.store, session, salt, importing=True))
                return await w.store.read_tokens(*arguments[:3])

        assert await residency.load(cast(JournalPort, Overtaken()), session, salt) is imported[0]
        assert residency.get(SESSION) is imported[0]


@in_virtual_time
async def test_a_damaged_record_does_not_keep_others_from_being_looked_up() -> None:
    async with world() as w:
        replica = await owned(w)
        other = "ses_bbbbbbbbbbbbbbbb"
        await w.open(other)
        await w.give(replica, other)
        await listen(replica, await w.request(replica, session_id=other))
        stored = w.executor.snapshot()
        record = stored[session_key(SESSION).encode()]
        assert isinstance(record, dict)
        record[b"state"] = b"?"
        w.executor.restore(stored)
        assert isinstance(await w.store.close(other, None), SessionWritten)
        await anyio.sleep(LATER)
        assert replica.app.session_ids() == [SESSION]
