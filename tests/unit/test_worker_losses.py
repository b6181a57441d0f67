"""What the store loses of a session at rest, its owner puts back though nobody asks for it."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import replica_pb2 as pb
from sessile.v1 import types_pb2

from loadtest.simulation.redis import Fault
from statestore.executor import ScriptCall
from statestore.ports import Appended
from statestore.records import FinishReason, Session, Turn, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.replica_world import (
    SESSION,
    Heard,
    RunningReplica,
    Standby,
    World,
    in_virtual_time,
    listen,
    world,
)
from workers.service import RECONCILE_S
from workers.turn.repair import repair

SOON = 1.5
"""A heartbeat tells of the loss within half a second; long before the sessions' turn comes."""
assert SOON < RECONCILE_S / 2


async def owner(w: World, name: str = "r1") -> RunningReplica:
    replica = await w.start_owner(name)
    await anyio.sleep(SOON)  # what it has beaten by then is what the store can go back behind
    return replica


async def statuses(w: World) -> dict[str, TurnStatus]:
    return {turn.spec.turn_id: turn.status for turn in await w.turns()}


async def cut_off(w: World, replica: RunningReplica, timeout_ms: int = 60_000) -> Heard:
    """A whole turn t1, of which the store then has some tokens only."""
    heard = Heard()
    standby = Standby(w, heard)
    request = await w.request(replica, timeout_ms=timeout_ms)
    await listen(replica, request, heard, between=standby.follow)
    await anyio.sleep(SOON)
    standby.promote()
    assert (await w.turn()).status is TurnStatus.RUNNING
    assert (await w.session()).head.length < heard.finished.end.length
    return heard


async def broken_off(
    w: World, replica: RunningReplica, request: pb.DispatchTurnRequest
) -> tuple[Heard, Standby]:
    """A turn whose run broke off after its client had more tokens than the store's standby has."""
    heard = Heard()
    standby = Standby(w, heard)
    await listen(replica, request, heard, between=standby.follow, until=lambda h: len(h.tokens) > 9)
    await replica.break_off()
    return heard, standby


async def check_is_back(w: World, heard: Heard) -> None:
    stored = await w.turn()
    assert stored.status is TurnStatus.COMMITTED
    assert stored.output_end.length == heard.finished.end.length
    assert (await w.ledger())[heard.accepted.output_start.length :] == heard.tokens
    assert (await w.session()).active_turn_id is None


@in_virtual_time
async def test_the_end_of_a_turn_is_put_back_soon_though_nobody_asks() -> None:
    async with world() as w:
        heard = await cut_off(w, await owner(w))
        await anyio.sleep(SOON)
        await check_is_back(w, heard)


@in_virtual_time
async def test_so_are_whole_turns_and_the_ownership_under_which_they_ran() -> None:
    async with world() as w:
        replica = await w.start()
        await w.open()
        kept = w.executor.snapshot()
        session = await w.give(replica)
        first = await listen(replica, await w.request(replica))
        await listen(replica, await w.request(replica, "More", "t2"))
        await anyio.sleep(SOON)
        ledger = await w.ledger()
        w.executor.restore(kept)
        await anyio.sleep(SOON)
        committed = TurnStatus.COMMITTED
        assert await statuses(w) == {"t1": committed, "t2": committed}
        assert await w.ledger() == ledger
        assert (await w.session()).owner == session.owner
        again = await listen(replica, await w.request(replica))
        assert again.tokens == first.tokens


@in_virtual_time
async def test_so_is_the_end_of_a_turn_whose_deadline_came_first() -> None:
    async with world() as w:
        heard = await cut_off(w, await owner(w), timeout_ms=1000)
        await w.store.sweep(9)
        assert (await w.turn()).status is TurnStatus.FAILED
        await anyio.sleep(SOON)
        await check_is_back(w, heard)


@pytest.mark.parametrize("overdue", [False, True])
def test_so_are_tokens_of_a_turn_that_broke_off(overdue: bool) -> None:
    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            replica = await owner(w)
            request = await w.request(replica, timeout_ms=1000 if overdue else 60_000)
            heard, standby = await broken_off(w, replica, request)
            await anyio.sleep(SOON)
            standby.promote()
            await w.store.sweep(9)
            await anyio.sleep(SOON)
            start = heard.accepted.output_start.length
            assert (await w.ledger())[start:][: len(heard.tokens)] == heard.tokens
            turn = await w.turn()
            if overdue:
                assert turn.result is not None
                assert turn.result.reason is FinishReason.DEADLINE
            else:
                assert turn.status is TurnStatus.RUNNING

    test()


@pytest.mark.parametrize("overdue", [False, True])
def test_so_are_those_lost_between_look_and_resume(overdue: bool) -> None:
    """``overdue``: the resume finds that the turn's deadline passed while the store was away."""

    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            replica, again = await owner(w), Heard()
            request = await w.request(replica, timeout_ms=1000 if overdue else 60_000)
            heard, standby = await broken_off(w, replica, request)
            request.turn.resume_from.CopyFrom(heard.end)
            away = anyio.Event()

            def fault(call: ScriptCall) -> Fault:
                if call.script.name == "resume":
                    away.set()
                return Fault.REQUEST_LOST if away.is_set() else Fault.NONE

            async def fail_over() -> None:
                await away.wait()
                await anyio.sleep(1.2)
                standby.promote()
                w.executor.fault = lambda call: Fault.NONE

            w.executor.fault = fault
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail_over)
                await listen(replica, request, again)
            start = heard.accepted.output_start.length
            tokens = (await w.ledger())[start:]
            assert tokens[: len(heard.tokens)] == heard.tokens
            assert tokens[len(heard.tokens) :] == again.tokens
            failed, committed = types_pb2.TURN_STATUS_FAILED, types_pb2.TURN_STATUS_COMMITTED
            assert again.finished.status == (failed if overdue else committed)

    test()


@in_virtual_time
async def test_a_loss_that_no_heartbeat_tells_of_is_noticed_when_the_sessions_turn_comes() -> None:
    async with world() as w:
        replica = await owner(w)
        heard = await cut_off(w, replica)
        w.executor.fault = lambda call: (
            Fault.REQUEST_LOST if call.script.name == "heartbeat" else Fault.NONE
        )
        await anyio.sleep(RECONCILE_S + SOON)
        await check_is_back(w, heard)


@pytest.mark.parametrize(("turn_id", "text"), [("t3", "More"), ("t3", "Else"), ("t2", "Else")])
def test_another_history_that_went_on_meanwhile_is_left_alone(turn_id: str, text: str) -> None:
    @in_virtual_time
    async def test() -> None:
        async with world() as w:
            first, second = await owner(w), await w.start("r2")
            await listen(first, await w.request(first))
            await anyio.sleep(SOON)
            kept = w.executor.snapshot()
            await w.give(second)
            await listen(second, await w.request(second, "More", "t2"))
            await listen(second, await w.request(second, "Still more", "t4"))
            w.executor.restore(kept)
            heard = Heard()

            async def tell() -> None:
                if 3 <= len(heard.tokens) < 5:
                    second.app.doubt()

            await listen(first, await w.request(first, text, turn_id), heard, between=tell)
            ledger = await w.ledger()
            assert ledger[heard.accepted.output_start.length :] == heard.tokens
            await anyio.sleep(2 * RECONCILE_S)
            assert list(await statuses(w)) == ["t1", turn_id]
            assert await w.ledger() == ledger

    test()


@pytest.mark.parametrize("after_ms", range(0, 500, 25))
def test_a_turn_that_is_asked_for_while_that_is_done_follows_it(after_ms: int) -> None:
    @in_virtual_time
    async def test() -> None:
        async with world(delay_s=0.03) as w:
            replica = await owner(w)
            await listen(replica, await w.request(replica))
            request = await w.request(replica, "Else", "t3")
            await anyio.sleep(SOON)
            kept = w.executor.snapshot()
            await listen(replica, await w.request(replica, "More", "t2"))
            w.executor.restore(kept)
            replica.app.doubt()
            await anyio.sleep(after_ms / 1000)
            heard = await listen(replica, request)
            assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
            await anyio.sleep(SOON)
            assert list(await statuses(w)) == ["t1", "t2", "t3"]
            assert (await w.session()).active_turn_id is None
            start = heard.accepted.output_start.length
            assert (await w.ledger())[start:] == heard.tokens

    test()


@in_virtual_time
async def test_a_turn_that_begins_and_ends_meanwhile_is_put_back_whole_or_not_at_all() -> None:
    """Also if the store then loses that turn, too, and is where it was found."""
    async with world() as w:
        replica = await owner(w)
        await listen(replica, await w.request(replica))
        kept = w.executor.snapshot()
        second = await listen(replica, await w.request(replica, "More", "t2"))
        third = await w.request(replica, "Still more", "t3")
        w.executor.restore(kept)
        resident = replica.app._ports.residency.get(SESSION)
        assert resident is not None
        begun: list[Heard] = []

        class SlowStore(RedisStore):
            async def get_turns(self, session: Session, start: int, count: int) -> tuple[Turn, ...]:
                if not begun:
                    begun.append(await listen(replica, third))
                    w.executor.restore(kept)
                return await super().get_turns(session, start, count)

        outcome = await repair(
            SlowStore(w.executor),
            resident,
            replica.ref,
            resident.epoch,
            None,
            anyio.current_time(),
            token_fingerprint=(await w.session()).token_fingerprint,
            unasked=True,
        )
        assert isinstance(outcome, Appended)
        session = await w.session()
        assert list(await statuses(w)) == ["t1", "t2"]
        assert (session.turn_index, session.head.length) == (2, second.finished.end.length)
        await anyio.sleep(SOON)
        assert list(await statuses(w)) == ["t1", "t2", "t3"]
        assert (await w.session()).head.length == begun[0].finished.end.length


@in_virtual_time
async def test_an_answer_to_a_heartbeat_that_gets_lost_is_no_loss_of_writes() -> None:
    async with world() as w:
        replica = await owner(w)
        await listen(replica, await w.request(replica))
        lost, asked = True, 0

        def fault(call: ScriptCall) -> Fault:
            nonlocal asked
            asked += call.script.name == "read_session"
            beat = call.script.name == "heartbeat"
            return Fault.REPLY_LOST if beat and lost else Fault.NONE

        w.executor.fault = fault
        await anyio.sleep(RECONCILE_S / 4)
        lost = False
        await anyio.sleep(RECONCILE_S / 4)
        assert asked == 0


@in_virtual_time
async def test_who_tells_of_a_cancel_has_the_session_put_back_at_once() -> None:
    async with world() as w:
        replica = await owner(w)
        heard = await cut_off(w, replica)
        await replica.app.stop_turn(pb.StopTurnRequest(session_id=SESSION, turn_id="t1"))
        await check_is_back(w, heard)


@in_virtual_time
async def test_a_session_at_rest_is_handed_over_with_what_was_lost() -> None:
    async with world() as w:
        replica = await owner(w)
        heard = await cut_off(w, replica)
        epoch = (await w.session()).epoch
        given = await replica.app.hand_over(
            pb.HandOverRequest(
                session_id=SESSION,
                epoch=types_pb2.Epoch(number=epoch.number, nonce=epoch.nonce),
                migration_id="m1",
                lease_ms=1000,
            )
        )
        assert given.head == heard.finished.end


@in_virtual_time
async def test_what_is_lost_again_while_it_is_put_back_is_put_back_again() -> None:
    """Who goes on with the session is not told of a loss that its owner can repair."""
    async with world() as w:
        replica = await owner(w)
        heard = await cut_off(w, replica)
        kept, repairs = w.executor.snapshot(), 0

        def fault(call: ScriptCall) -> Fault:
            nonlocal repairs
            if repairs == 1 and call.script.name != "repair":
                w.executor.restore(kept)
                repairs += 1
            repairs += call.script.name == "repair"
            return Fault.NONE

        w.executor.fault = fault
        request = await w.request(replica, "More", "t2")
        request.turn.precondition.head.CopyFrom(heard.finished.end)
        request.turn.precondition.turn_index = 1
        more = await listen(replica, request)
        assert more.finished.status == types_pb2.TURN_STATUS_COMMITTED
        assert repairs == 3
        assert await statuses(w) == {"t1": TurnStatus.COMMITTED, "t2": TurnStatus.COMMITTED}
