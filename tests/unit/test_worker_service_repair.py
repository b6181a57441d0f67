"""Turns against a store that forgets: their owner puts back what it holds, and clients are told of
the rest."""

from __future__ import annotations

import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from statestore.ports import TurnBegun
from statestore.records import TurnSpec
from tests.support.replica_world import (
    SESSION,
    Heard,
    RunningReplica,
    Standby,
    World,
    expected,
    in_virtual_time,
    listen,
    world,
)
from workers.residency import MAX_RECENT_TURNS
from workers.text.bytes_codec import BytesCodec


@in_virtual_time
async def test_the_owner_puts_back_what_the_store_lost_in_mid_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()
        standby = Standby(w, heard)
        lost = False

        async def fail_over() -> None:
            nonlocal lost
            await standby.follow()
            if len(heard.tokens) > 10 and not lost:
                lost = True
                standby.promote()

        await listen(replica, await w.request(replica), heard, between=fail_over)
        assert lost
        ledger = await w.ledger()
        start = heard.accepted.output_start.length
        assert heard.tokens == ledger[start:] == expected(ledger, start, 20)


async def cut_short(w: World, replica: RunningReplica, heard: Heard) -> None:
    """A turn whose last tokens the store loses, and that is cancelled before anybody writes."""
    standby = Standby(w, heard)
    cancelled = False

    async def fail_over() -> None:
        nonlocal cancelled
        await standby.follow()
        if len(heard.tokens) > 10 and not cancelled:
            cancelled = True
            standby.promote()
            await w.store.cancel_turn(SESSION, "t1")
            replica.run().look()

    await listen(replica, await w.request(replica), heard, between=fail_over)
    assert cancelled


@in_virtual_time
async def test_a_turn_cancelled_before_its_lost_tokens_are_back_ends_where_its_client_is() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()
        await cut_short(w, replica, heard)
        assert len(heard.tokens) > 10
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert heard.finished.end == heard.end
        assert heard.finished.usage.output_tokens == len(heard.tokens)
        assert heard.tokens == (await w.ledger())[heard.accepted.output_start.length :]
        assert (await w.turn()).status == "CANCELLED"
        known = types_pb2.Precondition(head=heard.finished.end, turn_index=1)
        await listen(replica, await w.request(replica, "More", "t2", precondition=known))


@in_virtual_time
async def test_a_turn_that_began_after_a_shorter_end_is_not_overwritten() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()
        standby = Standby(w, heard)

        async def fail_over() -> None:
            await standby.follow()
            if len(heard.tokens) > 10:
                standby.promote()
                await w.store.cancel_turn(SESSION, "t1")
                session = await w.session()
                short = session.head
                outcome = await w.store.begin_turn(
                    SESSION,
                    session.epoch,
                    short,
                    TurnSpec("other", b"", b"", 60_000),
                    [],
                    short,
                    token_fingerprint=BytesCodec().token_fingerprint,
                )
                assert isinstance(outcome, TurnBegun)

        with pytest.raises(errors.Unavailable, match="attach again"):
            await listen(replica, await w.request(replica), heard, between=fail_over)
        request = await w.request(replica)
        request.turn.resume_from.CopyFrom(heard.end)
        with pytest.raises(errors.DataLoss):
            await listen(replica, request)
        assert (await w.session()).active_turn_id == "other"


@in_virtual_time
async def test_what_the_store_loses_of_a_cancelled_turn_is_put_back_for_who_reads_it_again() -> (
    None
):
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()
        standby = Standby(w, heard)

        async def cancel() -> None:
            await standby.follow()
            if len(heard.tokens) > 10:
                await w.store.cancel_turn(SESSION, "t1")

        request = await w.request(replica)
        await listen(replica, request, heard, between=cancel)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        standby.promote()
        await w.store.cancel_turn(SESSION, "t1")
        request.turn.resume_from.CopyFrom(heard.end)
        again = await listen(replica, request)
        assert again.finished.end == heard.finished.end
        assert (await w.session()).head.length == heard.finished.end.length


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_the_store_loses_of_a_turn_that_broke_off_is_put_back_by_its_owner(
    cancelled: bool,
) -> None:
    @in_virtual_time
    async def turn() -> None:
        async with world() as w:
            replica = await w.start_owner()
            heard = Heard()
            standby = Standby(w, heard)

            request = await w.request(replica)
            await listen(
                replica, request, heard, between=standby.follow, until=lambda h: len(h.tokens) > 9
            )
            await replica.break_off()
            standby.promote()
            if cancelled:
                await w.store.cancel_turn(SESSION, "t1")
            request.turn.resume_from.CopyFrom(heard.end)
            rest = await listen(replica, request)
            tokens = heard.tokens + rest.tokens
            start = heard.accepted.output_start.length
            assert (
                tokens
                == (await w.ledger())[start:]
                == expected(await w.ledger(), start, len(tokens))
            )
            assert (len(tokens) < 20) == cancelled
            ended = (
                types_pb2.TURN_STATUS_CANCELLED if cancelled else types_pb2.TURN_STATUS_COMMITTED
            )
            assert rest.finished.status == ended

    turn()


@in_virtual_time
async def test_a_turn_whose_very_begin_was_lost_is_put_back() -> None:
    async with world() as w:
        replica = await w.start_owner()
        first = await listen(replica, await w.request(replica))
        kept = w.executor.snapshot()
        heard = Heard()
        lost = False

        async def fail_over() -> None:
            nonlocal lost
            if len(heard.tokens) > 10 and not lost:
                lost = True
                w.executor.restore(kept)

        await listen(replica, await w.request(replica, "More", "t2"), heard, between=fail_over)
        ledger = await w.ledger()
        start = heard.accepted.output_start.length
        assert start > first.finished.end.length
        assert heard.tokens == ledger[start:] == expected(ledger, start, 20)
        assert (await w.turn("t2")).index == 1


@in_virtual_time
async def test_lost_turns_are_put_back_before_the_next_one_begins() -> None:
    async with world() as w:
        replica = await w.start_owner()
        kept = w.executor.snapshot()
        first = await listen(replica, await w.request(replica))
        second = await listen(replica, await w.request(replica, "More", "t2"))
        w.executor.restore(kept)
        known = types_pb2.Precondition(head=second.finished.end, turn_index=2)
        third = await listen(replica, await w.request(replica, "x", "t3", precondition=known))
        ledger = await w.ledger()
        for heard in (first, second, third):
            start = heard.accepted.output_start.length
            assert heard.tokens == ledger[start : start + 20]
        assert [t.spec.turn_id for t in await w.turns()] == [
            "t1", "t2", "t3",
        ]  # fmt: skip


@in_virtual_time
async def test_a_session_of_which_more_is_lost_than_its_owner_holds_goes_on_once_that_is_told() -> (
    None
):
    async with world() as w:
        replica = await w.start_owner()
        kept = w.executor.snapshot()
        for number in range(MAX_RECENT_TURNS + 1):
            await listen(replica, await w.request(replica, turn_id=f"t{number}"))
        w.executor.restore(kept)
        with pytest.raises(errors.DataLoss):
            await listen(replica, await w.request(replica, "x", "again"))
        heard = await listen(replica, await w.request(replica, "x", "again"))
        ledger = await w.ledger()
        start = heard.accepted.output_start.length
        assert heard.tokens == ledger[start:] == expected(ledger, start, 20)


@in_virtual_time
async def test_a_dispatch_under_an_earlier_epoch_costs_the_owner_nothing_that_it_holds() -> None:
    async with world() as w:
        replica = await w.start_owner()
        late = await w.request(replica, "Late", "t2")
        await w.give(replica)
        kept = w.executor.snapshot()
        first = await listen(replica, await w.request(replica))
        w.executor.restore(kept)
        with pytest.raises(errors.NotOwner):
            await listen(replica, late)
        known = types_pb2.Precondition(head=first.finished.end, turn_index=1)
        second = await listen(replica, await w.request(replica, "x", "t2", precondition=known))
        ledger = await w.ledger()
        for heard in (first, second):
            start = heard.accepted.output_start.length
            assert heard.tokens == ledger[start : start + 20]


@in_virtual_time
async def test_neither_does_one_under_a_later_epoch_whose_grant_the_store_lost() -> None:
    async with world() as w:
        replica = await w.start_owner()
        kept = w.executor.snapshot()
        first = await listen(replica, await w.request(replica))
        known = types_pb2.Precondition(head=first.finished.end, turn_index=1)
        own = await w.request(replica, "x", "t2", precondition=known)
        await w.give(replica)
        lost = await w.request(replica, "Lost", "t3")
        w.executor.restore(kept)
        with pytest.raises(errors.NotOwner):
            await listen(replica, lost)
        second = await listen(replica, own)
        ledger = await w.ledger()
        for heard in (first, second):
            start = heard.accepted.output_start.length
            assert heard.tokens == ledger[start : start + 20]


@in_virtual_time
async def test_a_repair_replaces_another_historys_turn_even_of_the_same_tokens() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        await listen(first, await w.request(first))
        kept = w.executor.snapshot()
        await w.give(second)
        await listen(second, await w.request(second, "More", "t2"))
        await listen(second, await w.request(second, "More", "t3"))
        fourth = await w.request(second, "More", "t4")
        # The store forgets that the second took over, and the first goes on for another client.
        w.executor.restore(kept)
        await listen(first, await w.request(first, "More", "other"))
        await listen(second, fourth)
        turns = await w.turns()
        assert [turn.spec.turn_id for turn in turns] == ["t1", "t2", "t3", "t4"]


@in_virtual_time
async def test_a_lost_turn_that_had_broken_off_begins_anew_and_not_behind_its_own_tokens() -> None:
    async with world() as w:
        replica = await w.start_owner()
        first = await listen(replica, await w.request(replica))
        kept = w.executor.snapshot()
        request = await w.request(replica, "More", "t2")
        await listen(replica, request, until=lambda h: len(h.tokens) > 5)
        await replica.break_off()
        w.executor.restore(kept)
        await listen(replica, request)
        second = await w.turn("t2")
        assert second.input_start == first.finished.end.length
        assert second.output_end == (await w.session()).head


@in_virtual_time
async def test_a_turn_lost_by_the_store_ends_with_the_state_of_its_session() -> None:
    async with world() as w:
        replica = await w.start_owner()
        kept = w.executor.snapshot()
        heard = Heard()

        async def lose_and_suspend() -> None:
            if 5 < len(heard.tokens) < 10:
                w.executor.restore(kept)
                await w.store.suspend(SESSION)

        with pytest.raises(errors.SessionSuspended):
            await listen(replica, await w.request(replica), heard, between=lose_and_suspend)


@in_virtual_time
async def test_histories_that_part_before_what_the_owner_holds_are_not_spliced() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        await listen(first, await w.request(first))
        kept = w.executor.snapshot()
        await listen(first, await w.request(first, "More", "t2"))
        await w.give(second)
        await listen(second, await w.request(second, "More", "t3"))
        fourth = await w.request(second, "More", "t4")
        w.executor.restore(kept)
        first.app._ports.residency.release(SESSION, drop_kv=True)
        await listen(first, await w.request(first, "Something else", "other"))
        with pytest.raises(errors.DataLoss):
            await listen(second, fourth)
        turns = await w.turns()
        assert [turn.spec.turn_id for turn in turns] == ["t1", "other"]


@in_virtual_time
async def test_a_client_that_knows_more_than_the_ledger_gets_data_loss_from_a_new_owner() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        heard = Heard()
        standby = Standby(w, heard)

        request = await w.request(first)
        await listen(
            first, request, heard, between=standby.follow, until=lambda h: len(h.tokens) > 10
        )
        await first.kill()
        standby.promote()
        await w.give(second)
        request = await w.request(second)
        request.turn.resume_from.CopyFrom(heard.end)
        with pytest.raises(errors.DataLoss):
            await listen(second, request)


@in_virtual_time
async def test_who_heard_of_a_turn_that_is_lost_as_a_whole_does_not_begin_it_anew() -> None:
    """Also after another turn, which ends past the place that the client has."""
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        kept = w.executor.snapshot()
        heard = await listen(first, await w.request(first), until=lambda h: len(h.tokens) > 4)
        await first.kill()
        w.executor.restore(kept)
        await w.give(second)
        request = await w.request(second)
        request.turn.resume_from.CopyFrom(heard.end)
        without_messages = await w.request(second)
        without_messages.turn.resume_from.CopyFrom(heard.end)
        without_messages.turn.ClearField("messages")
        for _ in range(2):
            before = await w.session()
            with pytest.raises(errors.DataLoss):
                await listen(second, request)
            with pytest.raises(errors.DataLoss):
                await listen(second, without_messages)
            after = await w.session()
            assert (after.head, after.active_turn_id) == (before.head, None)
            params = {"max_tokens": 60, "ignore_eos": True}
            await listen(second, await w.request(second, "Other", "t2", params=params))


@in_virtual_time
async def test_who_only_attaches_to_a_lost_turn_is_told_of_the_loss_if_it_has_some_of_it() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        kept = w.executor.snapshot()
        heard = await listen(first, await w.request(first), until=lambda h: len(h.tokens) > 4)
        await first.kill()
        w.executor.restore(kept)
        await w.give(second)
        request = await w.request(second, "", attach_only=True)
        with pytest.raises(errors.NotFound):
            await listen(second, request)
        request.turn.resume_from.CopyFrom(heard.end)
        with pytest.raises(errors.DataLoss):
            await listen(second, request)
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_who_attaches_to_a_lost_turn_that_its_owner_holds_reads_it() -> None:
    async with world() as w:
        replica = await w.start_owner()
        kept = w.executor.snapshot()
        heard = await listen(replica, await w.request(replica))
        for turn_id, text in (("t1", ""), ("t1", "Hello")):
            w.executor.restore(kept)
            request = await w.request(replica, text, turn_id, attach_only=True)
            request.turn.resume_from.CopyFrom(heard.accepted.output_start)
            again = await listen(replica, request)
            assert (again.tokens, again.finished.end) == (heard.tokens, heard.finished.end)
        w.executor.restore(kept)
        with pytest.raises(errors.NotFound):
            await listen(replica, await w.request(replica, "", "t2", attach_only=True))
        assert (await w.turn()).output_end.length == heard.finished.end.length


@in_virtual_time
async def test_a_client_that_saw_the_end_of_a_turn_is_told_that_the_end_is_lost() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        heard = Heard()
        standby = Standby(w, heard)

        await listen(first, await w.request(first), heard, between=standby.follow)
        await first.kill()
        standby.promote()
        await w.give(second)
        known = types_pb2.Precondition(head=heard.finished.end, turn_index=1)
        with pytest.raises(errors.DataLoss):
            await listen(second, await w.request(second, "More", "t2", precondition=known))
        with pytest.raises(errors.TurnInProgress):
            await listen(second, await w.request(second, "More", "t3"))
