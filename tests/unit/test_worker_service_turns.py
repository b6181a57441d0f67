"""Turns through the replica's service: accept, stream, attach, replay, resume, fork."""

from __future__ import annotations

import anyio
import pytest
from sessile.v1 import types_pb2

from gateway.core import errors
from statestore.digest import RollingDigest
from statestore.ports import Append, Appended, SessionWritten
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
async def test_a_turn_whose_caller_goes_away_during_its_begin_runs_on() -> None:
    async with world(delay_s=0.05) as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        # The caller goes away while the begin is on its way: the turn runs, detached.
        with anyio.move_on_after(0.32):
            await listen(replica, request)
        await anyio.sleep(5)
        turn = await w.turn()
        assert turn.result is not None
        heard = await listen(replica, request)
        assert len(heard.tokens) == 20
        assert heard.accepted.attached


@in_virtual_time
async def test_two_dispatches_of_one_new_turn_share_one_run() -> None:
    async with world() as w:
        replica = await w.start_owner()
        request = await w.request(replica)
        one, two = Heard(), Heard()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, replica, request, one)
            tasks.start_soon(listen, replica, request, two)
        assert one.tokens == two.tokens
        assert sorted([one.accepted.attached, two.accepted.attached]) == [False, True]
        assert (await w.turn()).attempt == 1


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
async def test_streams_say_what_they_wait_for() -> None:
    limits = TurnLimits(waiting_interval_s=0.5)
    async with world(SimConfig(timing=SimTiming(step_ms=2000)), limits) as w:
        replica = await w.start_owner()
        heard = await listen(
            replica, await w.request(replica), until=lambda h: h.events[-1].HasField("waiting")
        )
        assert heard.events[-1].waiting.reason == types_pb2.TurnWaiting.REASON_QUEUED


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
