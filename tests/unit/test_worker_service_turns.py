"""Turns through the replica's service: accept, stream, attach, replay, resume, cancel."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import replica_pb2, types_pb2

from gateway.core import errors
from statestore.digest import RollingDigest
from statestore.ports import Append, Appended, SessionWritten, TurnEnded
from statestore.records import TurnStatus
from tests.support.replica_world import (
    SESSION,
    TENANT,
    Heard,
    expected,
    in_virtual_time,
    listen,
    world,
)
from workers.config import TurnLimits
from workers.engines.sim.config import SimConfig, SimTiming
from workers.text.byte_vocabulary import END_OF_TURN
from workers.text.bytes_codec import BytesCodec
from workers.turn.request import fork_seed


@in_virtual_time
async def test_a_turn_is_accepted_streamed_and_committed() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = await listen(replica, await w.request(replica))
        ledger, turn = await w.ledger(), await w.turn()
        start = heard.accepted.output_start.length
        assert turn.status is TurnStatus.COMMITTED
        assert heard.tokens == ledger[start:] == expected(ledger, start, 20)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED
        assert heard.finished.reason == types_pb2.FINISH_REASON_LENGTH
        assert heard.finished.usage.output_tokens == 20
        assert heard.finished.usage.input_tokens == start
        assert heard.finished.end.length == len(ledger)
        assert heard.finished.text_end == len(heard.text)
        assert not heard.accepted.attached
        assert heard.accepted.attempt == 1


@in_virtual_time
async def test_the_second_turn_appends_and_finds_its_prefix_cached() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica))
        before = await w.ledger()
        heard = await listen(replica, await w.request(replica, "More", "t2"))
        after = await w.ledger()
        assert after[: len(before)] == before
        assert heard.accepted.turn_index == 1
        assert heard.finished.usage.cached_tokens >= len(before) // 16 * 16 - 16 > 0
        start = heard.accepted.output_start.length
        assert heard.tokens == expected(after, start, 20)


@in_virtual_time
async def test_an_attached_stream_goes_on_from_where_the_client_is() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        first = await listen(replica, request, until=lambda h: len(h.tokens) >= 7)
        request.turn.resume_from.CopyFrom(first.end)
        second = await listen(replica, request)
        start = second.accepted.output_start.length
        assert second.accepted.attached
        assert first.tokens + second.tokens == (await w.ledger())[start:]


@in_virtual_time
async def test_a_committed_turn_is_replayed_without_owning_the_session() -> None:
    async with world() as w:
        owner, other = await w.start_owner("r1"), await w.start("r2")
        live = await listen(owner, await w.request(owner))
        request = await w.request(other)
        replayed = await listen(other, request)
        assert replayed.tokens == live.tokens
        assert replayed.text == live.text
        assert replayed.finished == live.finished
        request.turn.resume_from.CopyFrom(live.end)
        assert not (await listen(other, request)).tokens


@in_virtual_time
async def test_a_repeat_with_other_input_is_refused() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica))
        with pytest.raises(errors.TurnConflict):
            await listen(replica, await w.request(replica, "Something else"))
        assert (await listen(replica, await w.request(replica, ""))).tokens


@in_virtual_time
async def test_attach_only_does_not_begin_a_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        with pytest.raises(errors.NotFound) as caught:
            await listen(replica, await w.request(replica, attach_only=True))
        assert caught.value.reason == "TURN_NOT_FOUND"
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_other_tenants_incarnations_and_epochs_are_turned_away() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        request.tenant = "other"
        with pytest.raises(errors.NotFound):
            await listen(replica, request)
        request = await w.request(replica)
        request.replica.incarnation += 1
        with pytest.raises(errors.NotOwner):
            await listen(replica, request)
        request = await w.request(replica)
        await w.give(replica)  # a newer epoch
        with pytest.raises(errors.NotOwner):
            await listen(replica, request)
        assert (await w.session()).head.length == 0


@in_virtual_time
async def test_input_over_the_context_is_refused_before_anything_is_written() -> None:
    config = SimConfig(max_context_tokens=64)
    async with world(config) as w:
        replica = await w.start_owner()
        with pytest.raises(errors.ContextTooLong):
            await listen(replica, await w.request(replica, "x" * 100))
        session = await w.session()
        assert session.head.length == 0
        assert session.active_turn_id is None
        heard = await listen(replica, await w.request(replica, "x", params={"max_tokens": 1000}))
        assert heard.finished.reason == types_pb2.FINISH_REASON_LENGTH
        assert heard.finished.end.length == 64


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 3.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"max_tokens": 2, "min_tokens": 3},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [1 << 30]},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object]) -> None:
    @in_virtual_time
    async def refused() -> None:
        async with world() as w:
            replica = await w.start_owner()
            with pytest.raises(errors.InvalidRequest):
                await listen(replica, await w.request(replica, params=params))
            assert (await w.session()).head.length == 0

    refused()


@in_virtual_time
async def test_text_ends_before_a_stop_string_whose_tokens_stay_in_the_ledger() -> None:
    async with world() as w:
        replica = await w.start_owner()
        whole = await listen(replica, await w.request(replica))
        stop = whole.text[8:10]
        at = whole.text.index(stop)
        await w.open("ses_bbbbbbbbbbbbbbbb")
        await w.give(replica, "ses_bbbbbbbbbbbbbbbb")
        request = await w.request(
            replica,
            session_id="ses_bbbbbbbbbbbbbbbb",
            params={"max_tokens": 20, "stop": [stop]},
        )
        cut = await listen(replica, request)
        assert cut.text == whole.text[:at]
        assert cut.finished.reason == types_pb2.FINISH_REASON_STOP
        assert cut.finished.text_end == at
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        replayed = await listen(replica, request)
        assert replayed.text == cut.text
        assert replayed.finished == cut.finished


@in_virtual_time
async def test_a_killed_replicas_turn_goes_on_elsewhere_from_the_ledgers_tail() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        heard = await listen(first, await w.request(first), until=lambda h: len(h.tokens) > 5)
        await first.kill()
        assert (await w.give(second)).active_turn_id == "t1"
        request = await w.request(second)
        request.turn.resume_from.CopyFrom(heard.end)
        rest = await listen(second, request)
        ledger = await w.ledger()
        start = rest.accepted.output_start.length
        assert rest.accepted.attempt == 2
        assert heard.tokens + rest.tokens == ledger[start:] == expected(ledger, start, 20)


@in_virtual_time
async def test_a_resumed_turn_that_is_complete_is_committed_without_decoding_on() -> None:
    async with world() as w:
        first, second = await w.start_owner("r1"), await w.start("r2")
        heard = await listen(first, await w.request(first), until=lambda h: len(h.tokens) >= 3)
        await first.kill()
        # The owner journalled end-of-turn and died before it could commit.
        session, ledger = await w.session(), await w.ledger()
        state = RollingDigest.of(await w.store.tenant_salt(TENANT), [*ledger, END_OF_TURN])
        append = Append(SESSION, session.epoch, "t1", session.head, [END_OF_TURN], state.position())
        assert isinstance((await w.store.append_many([append]))[0], Appended)
        await w.give(second)
        heard = await listen(second, await w.request(second))
        assert heard.finished.reason == types_pb2.FINISH_REASON_STOP
        assert heard.finished.end.length == len(ledger) + 1
        assert second.engine.load().running == 0


@in_virtual_time
async def test_a_fenced_run_emits_nothing_more() -> None:
    async with world() as w:
        old, new = await w.start_owner("r1"), await w.start("r2")
        heard = Heard()
        request = await w.request(old)
        taken: list[int] = []

        async def take() -> None:
            if len(heard.tokens) > 5 and not taken:
                await w.give(new)
                taken.append((await w.session()).head.length)

        with pytest.raises(errors.NotOwner):
            await listen(old, request, heard, between=take)
        assert heard.end.length <= taken[0] == (await w.session()).head.length
        request = await w.request(new)
        request.turn.resume_from.CopyFrom(heard.end)
        rest = await listen(new, request)
        start = rest.accepted.output_start.length
        assert heard.tokens + rest.tokens == (await w.ledger())[start:]


@in_virtual_time
async def test_a_cancel_ends_the_stream_where_the_ledger_stands() -> None:
    async with world() as w:
        replica = await w.start_owner()
        heard = Heard()

        async def cancel() -> None:
            if len(heard.tokens) > 5:
                await w.store.cancel_turn(SESSION, "t1")
                await replica.app.stop_turn(
                    replica_pb2.StopTurnRequest(session_id=SESSION, turn_id="t1")
                )

        await listen(replica, await w.request(replica), heard, between=cancel)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert heard.finished.end.length == (await w.session()).head.length
        start = heard.accepted.output_start.length
        assert heard.tokens == (await w.ledger())[start:]
        assert heard.finished.text_end == len(heard.text)
        after = await listen(replica, await w.request(replica, "Next", "t2"))
        assert after.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_a_cancel_before_the_begin_leaves_a_tombstone() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await w.store.cancel_turn(SESSION, "t1")
        with pytest.raises(errors.TurnCancelled):
            await listen(replica, await w.request(replica))


@in_virtual_time
async def test_a_cancel_after_the_commit_changes_nothing() -> None:
    async with world() as w:
        replica = await w.start_owner()
        live = await listen(replica, await w.request(replica))
        outcome = await w.store.cancel_turn(SESSION, "t1")
        assert isinstance(outcome, TurnEnded)
        assert outcome.turn.status is TurnStatus.COMMITTED
        assert (await listen(replica, await w.request(replica))).finished == live.finished


@in_virtual_time
async def test_a_turn_past_its_deadline_fails_with_what_it_has() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 1000}, timeout_ms=300)
        heard = await listen(replica, request)
        assert heard.finished.status == types_pb2.TURN_STATUS_FAILED
        assert heard.finished.reason == types_pb2.FINISH_REASON_DEADLINE
        start = heard.accepted.output_start.length
        assert heard.tokens
        assert heard.tokens == (await w.ledger())[start:]
        assert anyio.current_time() < 0.4


@in_virtual_time
async def test_a_slow_client_blocks_neither_the_turn_nor_another_stream() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 100})
        slow, fast = Heard(), Heard()
        done: dict[str, float] = {}

        async def dawdle() -> None:
            await anyio.sleep(5)

        async def run(name: str, heard: Heard, pause: bool) -> None:
            await listen(replica, request, heard, between=dawdle if pause else None)
            done[name] = anyio.current_time()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, "slow", slow, True)
            tasks.start_soon(run, "fast", fast, False)
        assert done["fast"] < 3 < 5 <= done["slow"]
        assert slow.tokens == fast.tokens
        assert len(slow.events) < 10 < len(fast.events)


@in_virtual_time
async def test_a_turn_nobody_listens_to_ends_after_its_grace() -> None:
    limits = TurnLimits(detach_grace_s=2.0)
    async with world(limits=limits) as w:
        replica = await w.start_owner()
        request = await w.request(replica, params={"max_tokens": 5000})
        await listen(replica, request, until=lambda h: len(h.tokens) > 3)
        await anyio.sleep(3)
        turn = await w.turn()
        assert turn.status is TurnStatus.CANCELLED
        assert replica.app.load().queued_turns == 0


@in_virtual_time
async def test_a_closed_session_ends_its_run() -> None:
    async with world() as w:
        replica = await w.start_owner()
        session = await w.session()
        heard = Heard()

        async def close() -> None:
            if len(heard.tokens) > 5:
                await w.store.close(session.session_id, None)
                await replica.app.release_session(
                    replica_pb2.ReleaseSessionRequest(
                        session_id=session.session_id,
                        epoch=types_pb2.Epoch(
                            number=session.epoch.number, nonce=session.epoch.nonce
                        ),
                        drop_kv=True,
                    )
                )

        await listen(replica, await w.request(replica), heard, between=close)
        assert heard.finished.status == types_pb2.TURN_STATUS_CANCELLED
        assert replica.app.session_ids() == []
        await anyio.sleep(1)  # a step that is under way still holds its pages
        load = replica.engine.load()
        assert load.free_pages == replica.engine.info.capacity_pages
        assert load.pinned_pages == 0
        with pytest.raises(errors.SessionClosed):
            await listen(replica, await w.request(replica, "Next", "t2"))


@pytest.mark.parametrize("heard_tokens", range(1, 20, 3))
def test_nothing_stays_of_tokens_that_never_reached_the_ledger(heard_tokens: int) -> None:
    @in_virtual_time
    async def cancelled() -> None:
        # A slow store lets the engine run ahead of the ledger.
        async with world(delay_s=0.03) as w:
            replica = await w.start_owner()
            session = await w.session()
            heard = Heard()

            async def cancel() -> None:
                if len(heard.tokens) >= heard_tokens:
                    await w.store.cancel_turn(SESSION, "t1")

            request = await w.request(replica, params={"max_tokens": 100})
            await listen(replica, request, heard, between=cancel)
            await anyio.sleep(1)
            epoch = types_pb2.Epoch(number=session.epoch.number, nonce=session.epoch.nonce)
            await replica.app.release_session(
                replica_pb2.ReleaseSessionRequest(session_id=SESSION, epoch=epoch, drop_kv=True)
            )
            salt = await w.store.tenant_salt(TENANT)
            pages = replica.engine.block_hashes(salt, await w.ledger())
            assert pages
            assert replica.engine.resident_pages(pages) == 0

    cancelled()


@in_virtual_time
async def test_another_turn_of_a_busy_session_is_refused() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica), until=lambda h: len(h.tokens) > 3)
        with pytest.raises(errors.TurnInProgress):
            await listen(replica, await w.request(replica, "Other", "t2"))


@in_virtual_time
async def test_too_many_turns_are_refused_early() -> None:
    config = SimConfig(max_running=1, max_queued=1, timing=SimTiming(step_ms=10))
    async with world(config) as w:
        replica = await w.start()
        for name in "abc":
            await w.open(f"ses_{name * 16}")
            await w.give(replica, f"ses_{name * 16}")
        for name in "ab":
            request = await w.request(replica, session_id=f"ses_{name * 16}")
            await listen(replica, request, until=lambda h: True)
        with pytest.raises(errors.Overloaded) as caught:
            await listen(replica, await w.request(replica, session_id=f"ses_{'c' * 16}"))
        assert caught.value.retry_after_ms
        assert (await w.session(f"ses_{'c' * 16}")).head.length == 0


@in_virtual_time
async def test_a_foreign_tenant_does_not_disturb_a_running_turn() -> None:
    async with world() as w:
        replica = await w.start_owner()
        foreign = await w.request(replica)
        foreign.tenant, foreign.epoch.number = "other", foreign.epoch.number + 1

        async def disturb() -> None:
            with pytest.raises(errors.NotFound, match="does not exist"):
                await listen(replica, foreign)

        heard = await listen(replica, await w.request(replica), between=disturb)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_no_tenant_takes_every_place() -> None:
    config = SimConfig(max_running=2, max_queued=6, timing=SimTiming(step_ms=10))
    async with world(config) as w:
        replica = await w.start()

        async def begin(index: int, tenant: str) -> None:
            session_id = f"ses_{index:016d}"
            await w.open(session_id, tenant=tenant)
            await w.give(replica, session_id)
            request = await w.request(replica, session_id=session_id)
            request.tenant = tenant
            await listen(replica, request, until=lambda h: True)

        for index in range(6):
            await begin(index, "mallory")
        with pytest.raises(errors.Overloaded):
            await begin(6, "mallory")
        await begin(7, "alice")
        await begin(8, "bob")
        with pytest.raises(errors.Overloaded):
            await begin(9, "carol")


@in_virtual_time
async def test_a_poison_turn_fails_after_two_attempts_without_progress() -> None:
    config = SimConfig(timing=SimTiming(step_ms=1000))
    async with world(config) as w:
        await w.open()
        for name in ("r1", "r2"):
            replica = await w.start(name)
            await w.give(replica)
            request = await w.request(replica)
            heard = await listen(replica, request, until=lambda h: True)
            assert not heard.tokens
            await replica.kill()
        last = await w.start("r3")
        await w.give(last)
        heard = await listen(last, await w.request(last))
        assert heard.finished.status == types_pb2.TURN_STATUS_FAILED
        assert "attempts" in heard.finished.error


@in_virtual_time
async def test_the_precondition_tells_a_stale_client_from_lost_data() -> None:
    async with world() as w:
        replica = await w.start_owner()
        live = await listen(replica, await w.request(replica))
        good = types_pb2.Precondition(head=live.finished.end, turn_index=1)
        stale = types_pb2.Precondition(head=types_pb2.Position(length=3), turn_index=0)
        ahead = types_pb2.Precondition(head=types_pb2.Position(length=999), turn_index=1)
        forked = types_pb2.Precondition(
            head=types_pb2.Position(length=live.finished.end.length, digest=b"x" * 16),
            turn_index=1,
        )
        for pre, error in [
            (stale, errors.StaleClient),
            (ahead, errors.DataLoss),
            (forked, errors.DataLoss),
        ]:
            with pytest.raises(error):
                await listen(replica, await w.request(replica, "x", "t2", precondition=pre))
        await listen(replica, await w.request(replica, "x", "t2", precondition=good))


@in_virtual_time
async def test_streams_say_what_they_wait_for() -> None:
    limits = TurnLimits(waiting_interval_s=0.5)
    async with world(SimConfig(timing=SimTiming(step_ms=2000)), limits) as w:
        replica = await w.start_owner()
        heard = await listen(
            replica, await w.request(replica), until=lambda h: h.events[-1].HasField("waiting")
        )
        assert heard.events[-1].waiting.reason == types_pb2.TurnWaiting.REASON_QUEUED


@in_virtual_time
async def test_streams_of_one_turn_are_bounded() -> None:
    async with world(limits=TurnLimits(max_streams=1)) as w:
        replica = await w.start_owner()
        request = await w.request(replica)

        heard = Heard()

        async def second() -> None:
            if len(heard.tokens) < 5:
                with pytest.raises(errors.Overloaded):
                    await listen(replica, request)

        await listen(replica, request, heard, between=second)
        assert heard.finished.status == types_pb2.TURN_STATUS_COMMITTED


@in_virtual_time
async def test_a_turn_that_outgrew_a_smaller_replica_ends_there_with_all_it_said() -> None:
    async with world() as w:
        first = await w.start_owner()
        request = await w.request(first, params={"max_tokens": 200})
        heard = await listen(first, request, until=lambda h: len(h.tokens) > 60)
        await first.kill()
        journalled = (await w.session()).head.length
        w.config = SimConfig(max_context_tokens=50, timing=SimTiming(step_ms=10))
        small = await w.start("r2")
        await w.give(small)
        request = await w.request(small, "")
        request.turn.resume_from.CopyFrom(heard.end)
        rest = await listen(small, request)
        assert rest.finished.reason == types_pb2.FINISH_REASON_LENGTH
        assert rest.finished.end.length == journalled
        start = rest.accepted.output_start.length
        assert heard.tokens + rest.tokens == (await w.ledger())[start:]
        assert (
            await listen(small, await w.request(small, ""))
        ).tokens == heard.tokens + rest.tokens


class OtherTokens(BytesCodec):
    token_fingerprint = b"other tokens"


@in_virtual_time
async def test_a_replica_with_other_tokens_neither_begins_nor_resumes_a_turn() -> None:
    async with world() as w:
        first, other = await w.start_owner(), await w.start("r2", codec=OtherTokens())
        await listen(first, await w.request(first), until=lambda h: len(h.tokens) > 5)
        await first.kill()
        await w.give(other)
        before = await w.session(), await w.turn()
        with pytest.raises(errors.NotOwner, match="tokenizer"):
            await listen(other, await w.request(other, ""))
        assert (await w.session(), await w.turn()) == before
        third = await w.start("r3")
        await w.give(third)
        await listen(third, await w.request(third, ""))
        await w.give(other)
        before = await w.session(), await w.turn()
        with pytest.raises(errors.NotOwner, match="tokenizer"):
            await listen(other, await w.request(other, "More", "t2"))
        assert (await w.session(), await w.turn()) == before


@in_virtual_time
async def test_a_fork_goes_on_from_its_parents_ledger_and_kv() -> None:
    async with world() as w:
        replica = await w.start_owner()
        await listen(replica, await w.request(replica))
        parent = await w.ledger()
        child = f"{SESSION}.b"
        outcome = await w.store.fork(SESSION, child, None, ())
        assert isinstance(outcome, SessionWritten)
        await w.give(replica, child)
        heard = await listen(replica, await w.request(replica, "Fork", "t2", session_id=child))
        ledger, start = await w.ledger(child), heard.accepted.output_start.length
        assert ledger[: len(parent)] == parent
        assert heard.tokens == expected(ledger, start, 20)
        assert heard.finished.usage.cached_tokens == (len(parent) - 1) // 16 * 16
        assert await w.ledger() == parent


@in_virtual_time
async def test_forks_draw_other_noise_than_their_parent_and_each_other() -> None:
    async with world() as w:
        replica = await w.start()
        await w.open(seed=7, temperature=1.0)
        await w.give(replica)
        await listen(replica, await w.request(replica))
        names = [SESSION, *(f"{SESSION}.{name}" for name in "abc")]
        for name in names[1:]:
            assert isinstance(await w.store.fork(SESSION, name, None, ()), SessionWritten)
            await w.give(replica, name)

        async def say(name: str, **params: float) -> tuple[int, list[int]]:
            limits = {"max_tokens": 20} | params
            request = await w.request(replica, "Go on", "t2", session_id=name, params=limits)
            heard = await listen(replica, request)
            turn = await w.turn("t2", name)
            seed = types_pb2.RunTurnRequest.FromString(turn.spec.body).params.seed
            again = await listen(replica, request)
            assert (again.tokens, again.accepted.seed) == (heard.tokens, seed)
            return seed, heard.tokens

        said = [await say(name) for name in names[:3]]
        assert said[0][0] == 7, "a session's own default is used as it is"
        assert len({seed for seed, _ in said}) == 3
        assert len({tuple(tokens) for _, tokens in said}) == 3
        assert (await say(names[3], seed=7)) == said[0], "and so is a turn's own seed"


def test_a_forks_seed_is_a_function_of_its_id_and_what_it_inherited() -> None:
    assert fork_seed(7, "a") == fork_seed(7, "a")
    seeds = {fork_seed(seed, name) for seed in (0, 7, 2**64 - 1) for name in ("a", "b")}
    assert len(seeds) == 6
    assert max(seeds) < 2**63
