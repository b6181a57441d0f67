"""Turns through the gateway: pinned, gapless over failures, idempotent, bounded."""

from __future__ import annotations

from typing import Any

import anyio
from sessile.v1 import session_pb2, types_pb2

from gateway.config import Admission, GatewayConfig, Tables
from gateway.core.errors import (
    DataLoss,
    InternalError,
    NotFound,
    Overloaded,
    SessionSuspended,
    Unavailable,
)
from gateway.core.placement import PlacementModel
from statestore.ports import TakeOutcome
from statestore.records import TurnStatus
from tests.support.gateway_world import simulated, world


@simulated
async def test_a_turn_is_placed_run_and_delivered_whole() -> None:
    async with world(a=8) as w:
        session_id = await w.open()
        client = await w.finish(w.turn(session_id))
        assert client.error is None
        assert client.kinds == ["accepted", "tokens", "finished"]
        assert client.finished.status == types_pb2.TURN_STATUS_COMMITTED
        await w.check_gapless(client, session_id)


@simulated
async def test_a_turn_that_its_client_knows_to_be_accepted_is_not_begun_anew_elsewhere() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.01)
        assert client.kinds == ["accepted"]
        owner = (await w.session(session_id)).owner
        assert owner is not None
        first = w.fleet.replicas[owner.replica.replica_id]
        first.dead = True
        await w.finish(client)
        (again,) = [d for r in w.fleet.replicas.values() if r is not first for d in r.dispatches]
        assert again.turn.attach_only
        assert again.turn.resume_from == client.only("accepted")[0].accepted.output_start
        assert client.kinds == ["accepted", "moved", "tokens", "finished"]


@simulated
async def test_every_turn_of_a_session_goes_to_its_owner() -> None:
    async with world(a=2, b=2, c=2) as w:
        session_id = await w.open()
        for number in range(6):
            await w.finish(w.turn(session_id, f"t{number}"))
        served = {n: len(r.dispatches) for n, r in w.fleet.replicas.items() if r.dispatches}
        assert list(served.values()) == [6]


@simulated
async def test_a_killed_owner_costs_no_token_and_repeats_none() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.3)
        owner = (await w.session(session_id)).owner
        assert owner is not None
        w.fleet.replicas[owner.replica.replica_id].dead = True
        killed_at = anyio.current_time()
        await w.finish(client)
        assert client.error is None
        assert client.kinds == ["accepted", "tokens", "moved", "tokens", "finished"]
        moved = client.only("moved")[0].moved
        assert moved.reason == types_pb2.TurnMoved.REASON_FAILOVER
        assert getattr(moved, "from").replica_id == owner.replica.replica_id
        assert moved.attempt == 2
        await w.check_gapless(client, session_id)
        # A refused connection needs no stale heartbeat: no waiting beyond the rest of the turn.
        assert anyio.current_time() - killed_at < 40 * 0.022


@simulated
async def test_a_fail_over_takes_the_session_without_reading_it_first() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.3)
        calls = w.calls_to_store("get_session", "take")
        await w.kill_owner(session_id)
        calls.clear()
        await w.finish(client)
        assert calls[0] == "take"
        await w.check_gapless(client, session_id)


@simulated
async def test_what_is_no_turn_stream_ends_the_call_as_an_internal_error() -> None:
    async with world(a=3) as w:
        session_id = await w.open()
        w.fleet.replicas["a"].garbage = b"\xff\xff"
        client = await w.finish(w.turn(session_id, pause_s=0.2))
        assert isinstance(client.error, InternalError)
        assert "a replica sent what is no turn stream" in client.error.message
        assert len(client.tokens) == 3  # what came before is delivered, to a slow reader too
        w.fleet.replicas["a"].garbage = b""
        client = await w.finish(w.turn(session_id))
        await w.check_gapless(client, session_id)


@simulated
async def test_a_killed_owner_of_an_idle_session_is_replaced_when_the_next_turn_comes() -> None:
    async with world(a=3, b=3) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        owner = (await w.session(session_id)).owner
        assert owner is not None
        w.fleet.replicas[owner.replica.replica_id].dead = True
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None
        await w.check_gapless(client, session_id, "t2")


@simulated
async def test_sessions_of_a_lost_owner_are_taken_a_few_at_a_time() -> None:
    async with world(config=GatewayConfig(tables=Tables(takeovers=2)), a=3, b=3) as w:
        sessions = [await w.open(f"r{i}") for i in range(12)]
        for session_id in sessions:
            await w.finish(w.turn(session_id, "t1"))
        owners = [(await w.session(session_id)).owner for session_id in sessions]
        lost = w.fleet.replicas["a"]
        lost.dead = True
        mine = [s for s, o in zip(sessions, owners, strict=True) if o and o.replica == lost.ref]
        assert len(mine) > 4
        taking, most, take = 0, 0, w.store.take

        async def slowly(*args: Any) -> TakeOutcome:
            nonlocal taking, most
            taking, most = taking + 1, max(most, taking + 1)
            await anyio.sleep(0.05)
            taking -= 1
            return await take(*args)

        w.store.take = slowly  # type: ignore[method-assign, assignment]
        clients = [w.turn(session_id, "t2") for session_id in mine]
        for session_id, client in zip(mine, clients, strict=True):
            await w.finish(client)
            await w.check_gapless(client, session_id, "t2")
        assert most == 2


@simulated
async def test_a_frozen_owner_is_replaced_after_its_lease_and_its_late_writes_refused() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.3)
        owner = (await w.session(session_id)).owner
        assert owner is not None
        zombie = w.fleet.replicas[owner.replica.replica_id]
        zombie.frozen = True
        frozen_at = anyio.current_time()
        await w.finish(client)
        assert client.error is None
        assert 1.5 < anyio.current_time() - frozen_at < 5.0
        zombie.frozen = False
        await anyio.sleep(1.0)
        run = zombie.runs[session_id]
        assert run.error is not None
        assert run.error.reason == "NOT_OWNER"
        await w.check_gapless(client, session_id)


@simulated
async def test_a_broken_path_to_a_live_owner_is_dialled_again_not_taken_over() -> None:
    async with world(a=40, b=40) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.3)
        owner = (await w.session(session_id)).owner
        assert owner is not None
        w.fleet.replicas[owner.replica.replica_id].cut += 1
        await w.finish(client)
        assert client.error is None
        assert client.kinds == ["accepted", "tokens", "waiting", "tokens", "finished"]
        assert (await w.session(session_id)).owner == owner
        await w.check_gapless(client, session_id)


@simulated
async def test_a_stale_cached_owner_is_corrected_by_not_owner() -> None:
    async with world(gateways=2, a=3, b=3) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1", gateway=1))
        before = await w.session(session_id)
        assert before.owner is not None
        other = "b" if before.owner.replica.replica_id == "a" else "a"
        target = w.fleet.replicas[other].ref
        await w.store.take(session_id, before.epoch, target, b"elsewher")
        client = await w.finish(w.turn(session_id, "t2", gateway=1))
        assert client.error is None
        assert w.fleet.replicas[other].dispatches[-1].turn.turn_id == "t2"


@simulated
async def test_a_replica_that_disowns_what_the_store_says_is_its_own_is_replaced() -> None:
    async with world(a=3) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        w.fleet.replicas["a"].disown = 3
        before = await w.session(session_id)
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None
        assert (await w.session(session_id)).epoch > before.epoch


@simulated
async def test_a_restarted_owner_is_another_process() -> None:
    async with world(a=3) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        w.fleet.replicas["a"].dead = True
        await w.replica("a", output_tokens=3)
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None
        owner = (await w.session(session_id)).owner
        assert owner is not None
        assert owner.replica == w.fleet.replicas["a"].ref
        await w.check_gapless(client, session_id, "t2")


@simulated
async def test_two_gateways_that_attach_to_one_turn_see_the_same_tokens() -> None:
    async with world(gateways=2, a=30, b=30) as w:
        session_id = await w.open()
        first = w.turn(session_id)
        await anyio.sleep(0.2)
        second = w.turn(session_id, gateway=1, attach_only=True)
        await w.finish(first)
        await w.finish(second)
        assert first.error is None
        assert second.error is None
        assert first.tokens == second.tokens
        assert second.only("accepted")[0].accepted.attached


@simulated
async def test_two_gateways_that_lose_the_same_owner_agree_on_the_next() -> None:
    async with world(gateways=2, a=40, b=40, c=40) as w:
        session_id = await w.open()
        clients = [w.turn(session_id, gateway=0)]
        await anyio.sleep(0.1)
        clients.append(w.turn(session_id, gateway=1))
        await anyio.sleep(0.2)
        owner = (await w.session(session_id)).owner
        assert owner is not None
        w.fleet.replicas[owner.replica.replica_id].dead = True
        for client in clients:
            await w.finish(client)
            assert client.error is None
            await w.check_gapless(client, session_id)
        turn = await w.store.get_turn(session_id, "t1")
        assert turn is not None
        assert turn.attempt == 2


@simulated
async def test_a_client_that_comes_back_gets_only_what_it_does_not_have() -> None:
    async with world(gateways=2, a=12) as w:
        session_id = await w.open()
        whole = await w.finish(w.turn(session_id))
        have = whole.only("tokens")[4].tokens
        position = types_pb2.Position(length=have.position + 1, digest=have.digest)
        rest = await w.finish(w.turn(session_id, gateway=1, resume_from=position))
        assert rest.error is None
        assert rest.tokens == whole.tokens[5:]


@simulated
async def test_a_client_that_leaves_does_not_stop_the_turn() -> None:
    async with world(a=20) as w:
        session_id = await w.open()
        request = types_pb2.RunTurnRequest(session_id=session_id, turn_id="t1")
        received: list[bytes] = []

        async def sink(message: bytes) -> None:
            received.append(message)

        with anyio.move_on_after(0.1):
            await w.gateway.turns.run("acme", request, 60.0, sink)
        assert received
        assert w.gateway.turns.open_streams == 0
        await anyio.sleep(1.0)
        turn = await w.store.get_turn(session_id, "t1")
        assert turn is not None
        assert turn.status is TurnStatus.COMMITTED


@simulated
async def test_a_cancelled_turn_ends_at_once_and_its_stream_says_so() -> None:
    async with world(a=500) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.2)
        answer = await w.gateway.sessions.cancel_turn(
            "acme", session_pb2.CancelTurnRequest(session_id=session_id, turn_id="t1")
        )
        assert answer.status == types_pb2.TURN_STATUS_CANCELLED
        await w.finish(client)
        assert client.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert client.finished.reason == types_pb2.FINISH_REASON_CANCELLED
        assert "stop_turn" in w.fleet.replicas["a"].calls


@simulated
async def test_a_foreign_session_looks_like_none() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        stranger = await w.finish(w.turn(session_id, tenant="other"))
        unknown = await w.finish(w.turn("ses_abcdefgh", tenant="other"))
        assert isinstance(stranger.error, NotFound)
        assert isinstance(unknown.error, NotFound)
        assert stranger.error.message == f"no session {session_id!r}"
        assert unknown.error.message == "no session 'ses_abcdefgh'"
        assert stranger.error.reason == unknown.error.reason == "SESSION_NOT_FOUND"


@simulated
async def test_attaching_to_an_unknown_turn_is_not_found() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        client = await w.finish(w.turn(session_id, "nope", attach_only=True))
        assert isinstance(client.error, NotFound)
        assert client.error.reason == "TURN_NOT_FOUND"
        assert (await w.session(session_id)).owner is None


@simulated
async def test_who_attaches_to_an_unknown_turn_with_some_of_it_is_told_of_the_loss() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        heard = types_pb2.Position(length=9, digest=b"d" * 16)
        client = await w.finish(w.turn(session_id, "lost", attach_only=True, resume_from=heard))
        assert isinstance(client.error, DataLoss)
        assert (await w.session(session_id)).owner is None


@simulated
async def test_a_suspended_session_refuses_turns_but_replays_old_ones() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        first = await w.finish(w.turn(session_id))
        await w.gateway.sessions.suspend(
            "acme", session_pb2.SuspendSessionRequest(session_id=session_id)
        )
        refused = await w.finish(w.turn(session_id, "t2"))
        assert isinstance(refused.error, SessionSuspended)
        again = await w.finish(w.turn(session_id, "t1"))
        assert again.error is None
        assert again.tokens == first.tokens
        await w.gateway.sessions.resume(
            "acme", session_pb2.ResumeSessionRequest(session_id=session_id)
        )
        more = await w.finish(w.turn(session_id, "t2"))
        assert more.error is None


@simulated
async def test_without_any_replica_the_stream_waits_and_gives_up_at_the_deadline() -> None:
    async with world(a=40) as w:
        session_id = await w.open()
        client = w.turn(session_id, time_left_s=6.0)
        await anyio.sleep(0.3)
        w.fleet.replicas["a"].dead = True
        await w.finish(client)
        assert isinstance(client.error, Unavailable)
        assert "attach" in client.error.hint.lower() or client.error.retry_after_ms
        assert len(client.only("waiting")) >= 4
        # The turn is not lost: a replica that comes up later finishes it.
        await w.replica("b", output_tokens=40)
        rest = await w.finish(w.turn(session_id))
        assert rest.error is None
        await w.check_gapless(rest, session_id)


@simulated
async def test_a_replica_that_comes_back_in_time_saves_the_stream() -> None:
    async with world(a=40) as w:
        session_id = await w.open()
        client = w.turn(session_id, time_left_s=30.0)
        await anyio.sleep(0.3)
        w.fleet.replicas["a"].dead = True
        await anyio.sleep(3.0)
        await w.replica("b", output_tokens=40)
        await w.finish(client)
        assert client.error is None
        await w.check_gapless(client, session_id)


@simulated
async def test_a_turn_that_kills_its_replicas_fails_instead_of_killing_them_all() -> None:
    async with world(a=40, b=40, c=40, d=40) as w:
        for replica in w.fleet.replicas.values():
            replica.step_s = 1e9
        session_id = await w.open()
        client = w.turn(session_id)
        killed = 0
        for _ in range(50):
            await anyio.sleep(0.1)
            if client.done:
                break
            owner = (await w.session(session_id)).owner
            assert owner is not None
            replica = w.fleet.replicas[owner.replica.replica_id]
            if not replica.dead and session_id in replica.runs:
                replica.dead = True
                killed += 1
        await w.finish(client)
        assert client.error is None
        assert client.finished.status == types_pb2.TURN_STATUS_FAILED
        assert killed < 4


@simulated
async def test_an_overloaded_owner_is_told_to_a_new_turn_at_once() -> None:
    async with world(a=4) as w:
        session_id = await w.open()
        w.fleet.replicas["a"].overloaded = 1
        client = await w.finish(w.turn(session_id))
        assert isinstance(client.error, Overloaded)
        assert client.error.retry_after_ms == 50


@simulated
async def test_a_session_leaves_a_full_owner_for_an_idle_replica_with_its_kv() -> None:
    config = GatewayConfig(placement=PlacementModel(transfer_setup_ms=0.0))
    async with world(config=config, a=4, b=4) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        owner = (await w.session(session_id)).owner
        assert owner is not None
        hot = w.fleet.replicas[owner.replica.replica_id]
        idle = w.fleet.replicas["b" if hot.name == "a" else "a"]
        hot.overloaded = 1
        client = await w.finish(w.turn(session_id, "t2"))
        assert client.error is None
        await w.check_gapless(client, session_id, "t2")
        owner = (await w.session(session_id)).owner
        assert owner is not None
        assert owner.replica == idle.ref
        assert idle.dispatches[-1].prefix.source.replica_id == hot.name


@simulated
async def test_full_replicas_do_not_pass_a_session_round() -> None:
    async with world(a=4, b=4) as w:
        session_id = await w.open()
        for replica in w.fleet.replicas.values():
            replica.overloaded = 100
        client = await w.finish(w.turn(session_id))
        assert isinstance(client.error, Overloaded)
        assert sum(len(r.dispatches) for r in w.fleet.replicas.values()) == 2


@simulated
async def test_more_streams_than_the_bound_are_refused_with_a_delay() -> None:
    config = GatewayConfig(admission=Admission(max_streams=2, share_per_tenant=1.0))
    async with world(config=config, a=40) as w:
        sessions = [await w.open(f"r{i}") for i in range(3)]
        clients = [w.turn(s) for s in sessions]
        for client in clients:
            await w.finish(client)
        refused = [c.error for c in clients if c.error is not None]
        assert len(refused) == 1
        assert isinstance(refused[0], Overloaded)
        assert refused[0].metadata == {"bound": "max_streams", "limit": "2"}
        assert w.gateway.turns.open_streams == 0


@simulated
async def test_a_slow_client_gets_coalesced_messages_and_stops_nobody() -> None:
    async with world(a=100) as w:
        session_id = await w.open()
        slow = w.turn(session_id, pause_s=0.5)
        await anyio.sleep(3.0)
        turn = await w.store.get_turn(session_id, "t1")
        assert turn is not None
        assert turn.status is TurnStatus.COMMITTED
        await w.finish(slow)
        await w.check_gapless(slow, session_id)
        assert len(slow.messages) < 12
