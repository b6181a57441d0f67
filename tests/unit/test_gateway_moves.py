"""Moves and drains through the gateway: a failure at any step leaves a session that can run."""

from __future__ import annotations

from typing import Any, NoReturn

import anyio
import pytest
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2, types_pb2

from gateway.app.migration import MoveOptions
from gateway.app.ports import ReplicaLost
from gateway.config import GatewayConfig, Tables
from gateway.core.errors import DeadlineExceeded, MigrationRefused, NotFound, Unavailable
from gateway.core.machines import ReplicaState
from statestore.ports import SwitchOutcome
from tests.support.fake_replica import FakeReplica
from tests.support.gateway_world import TENANT, Client, World, simulated, world

FAILURES = {
    "import_session": Unavailable("no pages"),
    "hand_over": ReplicaLost("reset", refused=True),
}


async def owner_and_other(w: World, session_id: str) -> tuple[FakeReplica, FakeReplica]:
    owner = (await w.session(session_id)).owner
    assert owner is not None
    name = owner.replica.replica_id
    other = next(n for n in w.fleet.replicas if n != name)
    return w.fleet.replicas[name], w.fleet.replicas[other]


async def move(w: World, session_id: str, **options: object) -> fleet_pb2.MigrationResult:
    return await w.gateway.migrations.migrate(
        await w.session(session_id),
        MoveOptions(**options),  # type: ignore[arg-type]
    )


@simulated
async def test_an_idle_session_moves_with_its_kv_and_its_next_turn_runs_there() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        source, target = await owner_and_other(w, session_id)
        result = await move(w, session_id)
        assert result.moved
        assert result.verified_tokens == 32
        assert not result.running_turn
        assert getattr(result, "from").replica_id == source.name
        assert result.to.replica_id == target.name
        assert [r.migration_id != "" for r in source.released] == [True]
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None
        assert target.dispatches[-1].turn.turn_id == "t2"
        await w.check_gapless(client, session_id, "t2")


@simulated
async def test_a_running_turn_moves_without_a_gap_in_its_stream() -> None:
    async with world(a=120, b=120) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(1.0)
        result = await move(w, session_id)
        assert result.moved
        assert result.running_turn
        await w.finish(client)
        assert client.error is None
        assert client.kinds == ["accepted", "tokens", "moved", "tokens", "finished"]
        assert client.only("moved")[0].moved.reason == types_pb2.TurnMoved.REASON_MIGRATION
        await w.check_gapless(client, session_id)


@simulated
async def test_a_moved_turn_goes_on_though_nobody_is_attached() -> None:
    async with world(a=60, b=60) as w:
        session_id = await w.open()
        request = types_pb2.RunTurnRequest(session_id=session_id, turn_id="t1")

        async def sink(message: bytes) -> None:
            del message

        with anyio.move_on_after(0.5):
            await w.gateway.turns.run(TENANT, request, 60.0, sink)
        assert (await move(w, session_id)).moved
        await anyio.sleep(3.0)
        client = await w.finish(w.turn(session_id, attach_only=True))
        assert client.finished.status == types_pb2.TURN_STATUS_COMMITTED
        await w.check_gapless(client, session_id)


@simulated
async def test_a_turn_that_begins_just_before_the_switch_moves_too() -> None:
    async with world(a=60, b=60) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        switch = w.store.switch_migration
        clients: list[Client] = []

        async def late(*args: Any) -> SwitchOutcome:
            if not clients:
                clients.append(w.turn(session_id, "t2"))
                await anyio.sleep(0.3)
            return await switch(*args)

        w.store.switch_migration = late  # type: ignore[method-assign, assignment]
        result = await move(w, session_id)
        assert result.moved
        assert result.running_turn
        client = await w.finish(clients[0])
        assert client.error is None
        await w.check_gapless(client, session_id, "t2")


@simulated
async def test_a_cancel_during_the_copy_is_obeyed_and_the_session_moves_idle() -> None:
    async with world(a=500, b=500) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(1.0)
        _, target = await owner_and_other(w, session_id)
        cancel = session_pb2.CancelTurnRequest(session_id=session_id, turn_id="t1")

        async def cancelling() -> None:
            await w.gateway.sessions.cancel_turn(TENANT, cancel)

        target.on_import = lambda: w.tasks.start_soon(cancelling)
        result = await move(w, session_id)
        await w.finish(client)
        assert client.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert result.moved
        assert (await w.session(session_id)).active_turn_id is None


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("step", sorted(FAILURES))
def test_a_move_that_fails_leaves_the_owner_as_it_was(step: str, running: bool) -> None:
    @simulated
    async def body() -> None:
        async with world(a=120, b=120) as w:
            session_id = await w.open()
            client = w.turn(session_id)
            await anyio.sleep(1.0 if running else 5.0)
            source, target = await owner_and_other(w, session_id)
            before = (await w.session(session_id)).owner
            for one in (source, target):
                one.fail[step] = FAILURES[step]
            result = await move(w, session_id)
            if not running and step == "hand_over":
                assert result.moved
                return
            assert not result.moved
            assert result.detail
            assert [r.migration_id != "" for r in target.released] == [True]
            after = await w.session(session_id)
            assert after.owner == before
            assert after.migration is None
            await w.finish(client)
            assert client.error is None
            await w.check_gapless(client, session_id)
            more = await w.finish(w.turn(session_id, "t2"))
            assert more.error is None

    body()


@simulated
async def test_a_source_that_dies_in_mid_move_is_failed_over_not_moved() -> None:
    async with world(a=120, b=120) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(1.0)
        source, target = await owner_and_other(w, session_id)

        def die() -> None:
            source.dead = True

        target.on_import = die
        result = await move(w, session_id)
        assert not result.moved
        await w.finish(client)
        assert client.error is None
        await w.check_gapless(client, session_id)


@simulated
async def test_a_target_that_dies_in_mid_move_costs_nothing() -> None:
    async with world(a=120, b=120) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(1.0)
        source, target = await owner_and_other(w, session_id)
        target.dead = True
        result = await move(w, session_id)
        assert not result.moved
        await w.finish(client)
        assert client.kinds == ["accepted", "tokens", "finished"]
        assert len(source.dispatches) == 1


@simulated
async def test_a_move_that_is_cancelled_half_way_is_undone() -> None:
    async with world(a=200, b=200) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(1.0)
        source, target = await owner_and_other(w, session_id)
        target.frozen = True
        with anyio.move_on_after(0.5) as scope:
            await move(w, session_id)
        assert scope.cancelled_caught
        target.frozen = False
        assert (await w.session(session_id)).migration is None
        await w.finish(client)
        assert client.error is None
        assert len(source.dispatches) == 1


@simulated
async def test_a_move_whose_caller_leaves_after_the_switch_still_wakes_the_turn() -> None:
    async with world(a=200, b=200) as w:
        session_id = await w.open()
        w.turn(session_id)
        await anyio.sleep(1.0)
        source, target = await owner_and_other(w, session_id)
        released, dispatched = source.release_session, len(target.dispatches)
        with anyio.CancelScope() as scope:

            async def leave(request: replica_pb2.ReleaseSessionRequest, timeout_s: float) -> object:
                scope.cancel()
                await anyio.sleep(0.01)
                return await released(request, timeout_s)

            source.release_session = leave  # type: ignore[method-assign, assignment]
            await move(w, session_id)
        assert [r.migration_id != "" for r in source.released] == [True]
        assert any(d.turn.attach_only for d in target.dispatches[dispatched:])


@simulated
async def test_a_copy_is_held_no_longer_than_the_move_has_left() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        _, target = await owner_and_other(w, session_id)
        begin, leases_ms = w.store.begin_migration, []

        async def slowly(*args: Any) -> Any:
            outcome = await begin(*args)
            await anyio.sleep(0.9995)
            return outcome

        async def late(request: replica_pb2.ImportSessionRequest, timeout_s: float) -> NoReturn:
            leases_ms.append(request.lease_ms)
            raise DeadlineExceeded("no time to copy")

        w.store.begin_migration = slowly  # type: ignore[method-assign, assignment]
        target.import_session = late  # type: ignore[method-assign]
        assert not (await move(w, session_id, timeout_s=1.0)).moved
        assert leases_ms == [1]  # 0 would hold the pages for half a minute


@simulated
async def test_only_one_move_of_a_session_runs_at_a_time() -> None:
    async with world(a=40, b=40, c=40) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        results: list[fleet_pb2.MigrationResult] = []

        async def try_it() -> None:
            results.append(await move(w, session_id))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(try_it)
            tasks.start_soon(try_it)
        assert sorted(r.moved for r in results) == [False, True]


@simulated
async def test_an_incomplete_copy_aborts_unless_recompute_is_allowed() -> None:
    async with world(a=120, b=120) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        _, target = await owner_and_other(w, session_id)
        target.verified_tokens = 16
        refused = await move(w, session_id)
        assert not refused.moved
        allowed = await move(w, session_id, allow_recompute=True)
        assert allowed.moved
        assert allowed.verified_tokens == 16


@simulated
async def test_moves_that_cannot_be_tried_are_refused_with_the_reason() -> None:
    async with world(a=4, b=4) as w:
        session_id = await w.open()
        with pytest.raises(MigrationRefused, match="on no replica"):
            await move(w, session_id)
        await w.finish(w.turn(session_id))
        source, target = await owner_and_other(w, session_id)
        with pytest.raises(NotFound):
            await move(w, session_id, target_id="nobody")
        with pytest.raises(MigrationRefused, match="where the session is"):
            await move(w, session_id, target_id=source.name)
        target.frozen = True
        await anyio.sleep(4.0)
        with pytest.raises(MigrationRefused, match="is DOWN"):
            await move(w, session_id, target_id=target.name)
        with pytest.raises(MigrationRefused, match="no replica can take it"):
            await move(w, session_id)


@simulated
async def test_a_drain_empties_the_replica_and_ends_done() -> None:
    async with world(a=60, b=60, c=60) as w:
        sessions = [await w.open(f"r{i}") for i in range(6)]
        for session_id in sessions[:4]:
            await w.finish(w.turn(session_id))
        clients = {s: w.turn(s) for s in sessions[4:]}
        await anyio.sleep(0.5)
        full = (await owner_and_other(w, sessions[0]))[0].name
        progress = [p async for p in w.gateway.drains.drain(full, 60.0, shutdown=True)]
        assert progress[-1].done
        assert progress[-1].remaining == 0
        assert progress[-1].failed == 0
        assert progress[-1].moved_with_kv > 0
        drained = w.gateway.fleet.snapshot.named(full)
        assert drained is not None
        assert drained.state is ReplicaState.DRAINING
        for session_id in sessions:
            owner = (await w.session(session_id)).owner
            assert owner is not None
            assert owner.replica.replica_id != full
        for session_id, client in clients.items():
            await w.finish(client)
            assert client.error is None
            await w.check_gapless(client, session_id)
        new = await w.open("later")
        await w.finish(w.turn(new))
        assert new not in w.fleet.replicas[full].runs


@simulated
async def test_a_drain_with_nowhere_to_go_reports_what_remains_at_its_deadline() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        progress = [p async for p in w.gateway.drains.drain("a", 5.0, shutdown=False)]
        assert progress[-1].done
        assert progress[-1].remaining == 1
        assert progress[-1].failed == 1
        # It still serves what it owns.
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None


@simulated
async def test_a_session_that_ends_by_itself_is_no_failure_of_the_drain() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        drain = w.gateway.drains.drain("a", 60.0, shutdown=False)
        async for progress in drain:
            if progress.failed:
                close = session_pb2.CloseSessionRequest(session_id=session_id)
                await w.gateway.sessions.close(TENANT, close)
        assert (progress.done, progress.remaining, progress.failed) == (True, 0, 0)


@simulated
async def test_a_drain_keeps_its_time_limit_though_every_move_takes_all_it_is_given() -> None:
    async def slow(request: object, timeout_s: float) -> NoReturn:
        await anyio.sleep(timeout_s)
        raise DeadlineExceeded("the copy is slow")

    config = GatewayConfig(tables=Tables(drain_moves=1))
    async with world(config=config, a=40) as w:
        for number in range(4):
            await w.finish(w.turn(await w.open(f"r{number}")))
        (await w.replica("b")).import_session = slow  # type: ignore[method-assign]
        began = anyio.current_time()
        progress = [p async for p in w.gateway.drains.drain("a", 5.0, shutdown=False)]
        assert anyio.current_time() - began < 6.0
        assert progress[-1].done


@simulated
async def test_draining_an_unknown_replica_is_not_found() -> None:
    async with world(a=4) as w:
        with pytest.raises(NotFound):
            async for _ in w.gateway.drains.drain("nobody", 5.0, shutdown=False):
                pass
