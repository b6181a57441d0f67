"""Opening, forking, suspending, closing and reading sessions through the gateway."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import fleet_pb2, replica_pb2, session_pb2, types_pb2

from gateway.app.sessions import leading_digest
from gateway.config import Admission, GatewayConfig
from gateway.core.errors import (
    InvalidRequest,
    NotFound,
    SessileError,
    SessionClosed,
    TurnInProgress,
    Unavailable,
)
from statestore.records import SessionState, TurnStatus
from tests.support.fleets import MODEL
from tests.support.gateway_world import TENANT, World, simulated, world


def opening(request_id: str = "r1", **fields: object) -> session_pb2.OpenSessionRequest:
    return session_pb2.OpenSessionRequest(request_id=request_id, **fields)  # type: ignore[arg-type]


async def refusal(w: World, request: session_pb2.OpenSessionRequest) -> SessileError:
    with pytest.raises(SessileError) as caught:
        await w.gateway.sessions.open(TENANT, request)
    return caught.value


@simulated
async def test_the_same_request_id_opens_the_same_session_through_any_gateway() -> None:
    async with world(gateways=2, a=1) as w:
        ids = [
            (await g.sessions.open(TENANT, opening(model=MODEL))).session.session_id
            for g in (*w.gateways, *w.gateways)
        ]
        assert len(set(ids)) == 1
        other = await w.gateway.sessions.open("other", opening(model=MODEL))
        assert other.session.session_id != ids[0]


@simulated
async def test_a_request_id_with_other_content_is_refused() -> None:
    async with world(a=1) as w:
        await w.gateway.sessions.open(TENANT, opening(labels={"job": "1"}))
        error = await refusal(w, opening(labels={"job": "2"}))
        assert error.reason == "REQUEST_ID_REUSED"


@simulated
async def test_the_only_model_is_the_default_and_an_unknown_one_is_named() -> None:
    async with world(a=1) as w:
        opened = await w.gateway.sessions.open(TENANT, opening())
        assert opened.session.model == MODEL
        assert opened.session.state == session_pb2.SESSION_STATE_OPEN
        error = await refusal(w, opening("r2", model="nope"))
        assert isinstance(error, NotFound)
        assert error.reason == "MODEL_NOT_FOUND"
        assert MODEL in error.hint


@simulated
async def test_without_a_fleet_opening_is_worth_a_retry() -> None:
    async with world() as w:
        error = await refusal(w, opening())
        assert isinstance(error, Unavailable)
        assert error.retry_after_ms


@simulated
async def test_requests_that_make_no_sense_are_refused_before_anything_is_stored() -> None:
    async with world(a=1) as w:
        bad = [
            opening(""),
            opening("x" * 129),
            opening(labels={str(i): "v" for i in range(33)}),
            opening(labels={"k": "v" * 129}),
            opening(messages=[types_pb2.Message(content="no role")]),
            opening(tools=[types_pb2.ToolDefinition(name="f")] * 2),
            *(
                opening(tools=[types_pb2.ToolDefinition(name=name)])
                for name in ("", "a b", "f\n", "x" * 65)
            ),
            opening(
                messages=[
                    types_pb2.Message(role=types_pb2.Message.ROLE_SYSTEM, content="x" * (5 << 20))
                ]
            ),
        ]
        for request in bad:
            assert isinstance(await refusal(w, request), InvalidRequest)
        page = await w.gateway.sessions.list(TENANT, session_pb2.ListSessionsRequest())
        assert not page.sessions


@simulated
async def test_lists_show_the_callers_sessions_by_state_and_label() -> None:
    async with world(a=1) as w:
        sessions = w.gateway.sessions
        for number in range(4):
            await sessions.open(TENANT, opening(f"r{number}", labels={"even": str(number % 2)}))
            await anyio.sleep(0.01)
        await sessions.open("other", opening("r9"))
        every = await sessions.list(TENANT, session_pb2.ListSessionsRequest())
        assert len(every.sessions) == 4
        even = await sessions.list(TENANT, session_pb2.ListSessionsRequest(labels={"even": "0"}))
        assert len(even.sessions) == 2
        closed = every.sessions[0].session_id
        await sessions.close(TENANT, session_pb2.CloseSessionRequest(session_id=closed))
        left = await sessions.list(TENANT, session_pb2.ListSessionsRequest())
        assert closed not in [s.session_id for s in left.sessions]
        ended = await sessions.list(
            TENANT, session_pb2.ListSessionsRequest(states=[session_pb2.SESSION_STATE_CLOSED])
        )
        assert [s.session_id for s in ended.sessions] == [closed]
        for bad in (
            session_pb2.ListSessionsRequest(page_size=1001),
            session_pb2.ListSessionsRequest(page_token="made up"),
        ):
            with pytest.raises(InvalidRequest):
                await sessions.list(TENANT, bad)


@simulated
async def test_pages_of_a_list_continue_where_the_last_one_ended() -> None:
    async with world(a=1) as w:
        for number in range(5):
            await w.gateway.sessions.open(TENANT, opening(f"r{number}"))
            await anyio.sleep(0.01)
        found, token = [], ""
        while True:
            page = await w.gateway.sessions.list(
                TENANT, session_pb2.ListSessionsRequest(page_size=2, page_token=token)
            )
            found += [s.session_id for s in page.sessions]
            token = page.next_page_token
            if not token:
                break
        assert len(found) == len(set(found)) == 5


@simulated
async def test_foreign_sessions_cannot_be_touched_by_any_call() -> None:
    async with world(a=2) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        sessions = w.gateway.sessions
        calls = [
            sessions.get("other", session_pb2.GetSessionRequest(session_id=session_id)),
            sessions.cancel_turn(
                "other", session_pb2.CancelTurnRequest(session_id=session_id, turn_id="t1")
            ),
            sessions.fork(
                "other", session_pb2.ForkSessionRequest(session_id=session_id, request_id="f")
            ),
            sessions.suspend("other", session_pb2.SuspendSessionRequest(session_id=session_id)),
            sessions.resume("other", session_pb2.ResumeSessionRequest(session_id=session_id)),
            sessions.close("other", session_pb2.CloseSessionRequest(session_id=session_id)),
            sessions.transcript("other", session_pb2.GetTranscriptRequest(session_id=session_id)),
        ]
        for call in calls:
            with pytest.raises(NotFound) as caught:
                await call
            assert caught.value.reason == "SESSION_NOT_FOUND"
        assert (await w.session(session_id)).state is SessionState.OPEN


@simulated
async def test_a_fork_runs_on_its_own_and_is_made_once() -> None:
    async with world(a=400, b=400) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id, "t1"))
        request = session_pb2.ForkSessionRequest(session_id=session_id, request_id="f1")
        fork = (await w.gateway.sessions.fork(TENANT, request)).session
        again = (await w.gateway.sessions.fork(TENANT, request)).session
        assert fork.session_id == again.session_id
        assert fork.parent_id == session_id
        assert fork.turn_index == 1
        assert fork.session_id.startswith(session_id + ".")
        client = await w.finish(w.turn(fork.session_id, "t1b"))
        assert client.error is None
        await w.check_gapless(client, fork.session_id, "t1b")
        # The parent's owner holds a prefix that is worth staying with.
        parent, child = await w.session(session_id), await w.session(fork.session_id)
        assert parent.owner is not None
        assert child.owner is not None
        assert child.owner.replica == parent.owner.replica
        with pytest.raises(InvalidRequest):
            await w.gateway.sessions.fork(
                TENANT,
                session_pb2.ForkSessionRequest(
                    session_id=session_id, request_id="f2", at_turn_index=9
                ),
            )


@simulated
async def test_suspending_frees_the_owner_and_is_refused_while_a_turn_runs() -> None:
    async with world(a=30) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.2)
        request = session_pb2.SuspendSessionRequest(session_id=session_id)
        with pytest.raises(TurnInProgress):
            await w.gateway.sessions.suspend(TENANT, request)
        await w.finish(client)
        answer = await w.gateway.sessions.suspend(TENANT, request)
        assert answer.session.state == session_pb2.SESSION_STATE_SUSPENDED
        assert not answer.session.HasField("owner")
        released = w.fleet.replicas["a"].released
        assert [r.session_id for r in released] == [session_id]
        assert released[0].drop_kv


@simulated
async def test_closing_ends_the_turn_drops_the_kv_and_may_be_repeated() -> None:
    async with world(a=300) as w:
        session_id = await w.open()
        client = w.turn(session_id)
        await anyio.sleep(0.2)
        request = session_pb2.CloseSessionRequest(session_id=session_id)
        await w.gateway.sessions.close(TENANT, request)
        await w.gateway.sessions.close(TENANT, request)
        await w.finish(client)
        turn = await w.store.get_turn(session_id, "t1")
        assert turn is not None
        assert turn.status is TurnStatus.CANCELLED
        assert w.fleet.replicas["a"].released[0].drop_kv
        with pytest.raises(InvalidRequest):
            await w.gateway.sessions.close(
                TENANT,
                session_pb2.CloseSessionRequest(session_id=session_id, retention_ms=1 << 40),
            )


@simulated
async def test_an_owner_is_asked_to_put_back_lost_writes_before_they_would_be_final() -> None:
    async with world(a=2) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        replica, states = w.fleet.replicas["a"], list[SessionState]()
        stop_turn = replica.stop_turn

        async def look(
            request: replica_pb2.StopTurnRequest, timeout_s: float
        ) -> replica_pb2.StopTurnResponse:
            session = await w.store.get_session(request.session_id)
            assert session is not None
            states.append(session.state)
            return await stop_turn(request, timeout_s)

        replica.stop_turn = look  # type: ignore[method-assign]
        sessions = w.gateway.sessions
        await sessions.fork(
            TENANT, session_pb2.ForkSessionRequest(session_id=session_id, request_id="f")
        )
        await sessions.suspend(TENANT, session_pb2.SuspendSessionRequest(session_id=session_id))
        await sessions.resume(TENANT, session_pb2.ResumeSessionRequest(session_id=session_id))
        await w.finish(w.turn(session_id, "t2"))
        await sessions.close(TENANT, session_pb2.CloseSessionRequest(session_id=session_id))
        assert states == [SessionState.OPEN] * 3


@simulated
async def test_purging_leaves_nothing() -> None:
    async with world(a=2) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        await w.gateway.sessions.close(
            TENANT, session_pb2.CloseSessionRequest(session_id=session_id, purge=True)
        )
        with pytest.raises(NotFound):
            await w.gateway.sessions.get(
                TENANT, session_pb2.GetSessionRequest(session_id=session_id)
            )


@simulated
async def test_a_dead_owner_does_not_keep_a_session_from_closing() -> None:
    async with world(a=2) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        w.fleet.replicas["a"].dead = True
        await w.gateway.sessions.close(
            TENANT, session_pb2.CloseSessionRequest(session_id=session_id)
        )
        assert (await w.session(session_id)).state is SessionState.CLOSED


@simulated
async def test_cancelling_an_unknown_turn_keeps_it_from_beginning() -> None:
    async with world(a=2) as w:
        session_id = await w.open()
        answer = await w.gateway.sessions.cancel_turn(
            TENANT, session_pb2.CancelTurnRequest(session_id=session_id, turn_id="later")
        )
        assert answer.status == types_pb2.TURN_STATUS_UNSPECIFIED
        client = await w.finish(w.turn(session_id, "later"))
        assert client.error is not None


@simulated
async def test_a_transcript_is_read_from_the_owner_or_from_anybody_with_its_tokenizer() -> None:
    async with world(a=2, b=2) as w:
        session_id = await w.open()
        request = session_pb2.GetTranscriptRequest(session_id=session_id)
        empty = await w.gateway.sessions.transcript(TENANT, request)
        assert not empty.turns
        await w.finish(w.turn(session_id))
        owner = (await w.session(session_id)).owner
        assert owner is not None
        answer = await w.gateway.sessions.transcript(TENANT, request)
        assert answer.turns[0].turn_id == f"read by {owner.replica.replica_id}"
        assert answer.session.session_id == session_id
        await w.gateway.sessions.suspend(
            TENANT, session_pb2.SuspendSessionRequest(session_id=session_id)
        )
        w.fleet.replicas[owner.replica.replica_id].dead = True
        await anyio.sleep(3.0)
        answer = await w.gateway.sessions.transcript(TENANT, request)
        assert answer.turns[0].turn_id != f"read by {owner.replica.replica_id}"


@simulated
async def test_a_watch_tells_every_settled_change_and_ends_with_the_session() -> None:
    async with world(a=3) as w:
        session_id = await w.open()
        seen: list[session_pb2.Session] = []

        async def watch() -> None:
            async for message in w.gateway.watches.session(TENANT, session_id):
                seen.append(message.session)  # noqa: PERF401 - seen while it runs

        w.tasks.start_soon(watch)
        await anyio.sleep(0.5)
        await w.finish(w.turn(session_id))
        await anyio.sleep(0.5)
        assert seen[0].turn_index == 0
        assert seen[-1].turn_index == 1
        await w.gateway.sessions.close(
            TENANT, session_pb2.CloseSessionRequest(session_id=session_id)
        )
        await anyio.sleep(0.5)
        assert seen[-1].state == session_pb2.SESSION_STATE_CLOSED


@simulated
async def test_the_fleet_is_listed_and_watched() -> None:
    async with world(a=1) as w:
        seen: list[fleet_pb2.WatchFleetResponse] = []

        async def watch() -> None:
            async for message in w.gateway.watches.fleet(200):
                seen.append(message)  # noqa: PERF401 - seen while it runs

        w.tasks.start_soon(watch)
        await w.replica("b")
        states = {r.ref.replica_id: r.state for r in w.gateway.watches.replicas(False)}
        assert states == dict.fromkeys("ab", fleet_pb2.REPLICA_STATE_READY)
        w.fleet.replicas["a"].dead = True
        await anyio.sleep(3.0)
        assert [r.ref.replica_id for r in w.gateway.watches.replicas(False)] == ["b"]
        assert {r.state for r in seen[-1].replicas} == {
            fleet_pb2.REPLICA_STATE_READY,
            fleet_pb2.REPLICA_STATE_DOWN,
        }


@simulated
async def test_one_gateway_at_a_time_sweeps_and_another_takes_over() -> None:
    async with world(gateways=2, a=1000) as w:
        await anyio.sleep(2.0)
        assert [g.sweeper.leading for g in w.gateways].count(True) == 1
        session_id = await w.open()
        client = w.turn(session_id, timeout_ms=3000)
        await anyio.sleep(0.2)
        for replica in w.fleet.replicas.values():
            replica.dead = True
        await w.finish(client)
        await anyio.sleep(3.0)
        turn = await w.store.get_turn(session_id, "t1")
        assert turn is not None
        assert turn.status is TurnStatus.FAILED


def test_leading_digests_are_secret_to_the_tenant_and_name_the_content() -> None:
    message = types_pb2.Message(role=types_pb2.Message.ROLE_SYSTEM, content="Be brief.")
    one, other = opening("r1", messages=[message]), opening("r2", messages=[message])
    assert leading_digest(b"salt", one) == leading_digest(b"salt", other)
    assert leading_digest(b"salt", one) != leading_digest(b"pepper", one)
    assert leading_digest(b"salt", opening()) == b""


@simulated
async def test_a_late_repeat_of_a_purged_fork_is_told_that_the_fork_may_be_gone() -> None:
    async with world(a=1) as w:
        session_id = await w.open()
        request = session_pb2.ForkSessionRequest(request_id="f", session_id=session_id)
        fork = (await w.gateway.sessions.fork(TENANT, request)).session.session_id
        await w.gateway.sessions.close(
            TENANT, session_pb2.CloseSessionRequest(session_id=fork, purge=True)
        )
        with pytest.raises(SessionClosed, match="or the fork that this request id made"):
            await w.gateway.sessions.fork(TENANT, request)


@simulated
async def test_ledger_bytes_of_a_fork_are_its_own_only() -> None:
    async with world(a=1) as w:
        session_id = await w.open()
        await w.finish(w.turn(session_id))
        parent = (await w.gateway.sessions.get(TENANT, asked(session_id))).session
        assert parent.ledger_bytes == 4 * parent.head.length > 0
        forked = await w.gateway.sessions.fork(
            TENANT, session_pb2.ForkSessionRequest(request_id="f", session_id=session_id)
        )
        assert forked.session.head.length == parent.head.length
        assert forked.session.ledger_bytes == 0


def asked(session_id: str) -> session_pb2.GetSessionRequest:
    return session_pb2.GetSessionRequest(session_id=session_id)


@simulated
async def test_leading_messages_and_tools_are_bounded_to_the_byte() -> None:
    request = opening(messages=[types_pb2.Message(role=types_pb2.Message.ROLE_SYSTEM, content="x")])
    size = len(request.SerializeToString(deterministic=True))
    for bound, fits in ((size, True), (size - 1, False)):
        config = GatewayConfig(admission=Admission(max_preamble_bytes=bound))
        async with world(config=config, a=1) as w:
            if fits:
                await w.gateway.sessions.open(TENANT, request)
            else:
                error = await refusal(w, request)
                # No RESOURCE_EXHAUSTED: a repeat of the same request never helps.
                assert isinstance(error, InvalidRequest)
                assert str(bound) in error.message
