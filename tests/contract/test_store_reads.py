"""Reading ledgers, and all that a turn needs at once."""

from __future__ import annotations

import pytest

from statestore import keys
from statestore.journal import MAX_TURN_BYTES_PER_READ, READ_PIECE_TOKENS
from statestore.ports import TurnResumed
from statestore.records import FinishReason, LedgerPiece, Turn, TurnContext, TurnResult, TurnStatus
from statestore.redis_store import RedisStore
from statestore.script_runner import script_call
from tests.support.owners import B, Owner, opened, position_of, session_of
from tests.support.stores import ANSWERING, Backend, CountingExecutor

pytestmark = pytest.mark.anyio


async def context(
    store: RedisStore, session_id: str, turn_id: str, tokens_from: int = 0
) -> TurnContext:
    found = await store.get_turn_context(session_id, turn_id, tokens_from)
    assert found is not None
    return found


async def test_any_range_of_a_ledger_can_be_read(store: RedisStore) -> None:
    owner = await Owner.of(store)
    tokens = list(range(70_000))
    await owner.begun("t1", tokens)
    session = await store.get_session("ses_f")
    assert session is not None
    assert await store.read_tokens(session, 0, 70_000) == tokens
    assert await store.read_tokens(session, 65_530, 65_540) == tokens[65_530:65_540]
    assert await store.read_tokens(session, 69_999, 80_000) == [69_999]
    assert await store.read_tokens(session, 5, 5) == []


async def test_the_bytes_of_a_ledger_are_told(backend: Backend, store: RedisStore) -> None:
    await (await Owner.of(store)).run_turn("t1", [4, 5])
    await store.fork("ses_f", "ses_f.c", None, ())
    await (await Owner.of(store, "ses_f.c")).run_turn("t2", [6])
    for session_id, size in (("ses_f", 20), ("ses_f.c", 16)):
        assert (await session_of(store, session_id)).ledger_bytes == size
        call = script_call("read_ledger", [keys.ledger_key(session_id)], [0, -1])
        await backend.executor.execute([call], 5)
        (stored,) = await backend.executor.execute([call], 5)
        assert isinstance(stored, bytes)
        assert len(stored) == size


async def test_a_session_tells_when_its_last_turn_ended(store: RedisStore) -> None:
    owner = await Owner.of(store)
    assert (await session_of(store, "ses_f")).turn_ended_at_ms == 0
    await owner.begun("t1")
    await store.cancel_turn("ses_f", "t1")
    cancelled = await session_of(store, "ses_f")
    assert cancelled.created_at_ms <= cancelled.turn_ended_at_ms == cancelled.updated_at_ms
    await owner.run_turn("t2", [4])
    ended = (await session_of(store, "ses_f")).turn_ended_at_ms
    await store.suspend("ses_f")
    assert (
        (await session_of(store, "ses_f")).turn_ended_at_ms == ended >= cancelled.turn_ended_at_ms
    )
    await store.fork("ses_f", "ses_f.c", None, ())
    assert (await session_of(store, "ses_f.c")).turn_ended_at_ms == 0


async def test_a_read_of_an_older_record_stops_at_its_head(store: RedisStore) -> None:
    owner = await Owner.of(store)
    session = await opened(store)
    await owner.begun()
    assert await store.read_tokens(session, 0, 10) == []


@ANSWERING
async def test_a_long_read_takes_few_round_trips(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    tokens = list(range(3 * READ_PIECE_TOKENS + 1))
    await owner.begun("t1", tokens)
    session = await store.get_session("ses_f")
    assert session is not None
    executor = CountingExecutor(backend.executor)
    assert await RedisStore(executor).read_tokens(session, 0, len(tokens)) == tokens
    assert executor.round_trips == [["read_ledger"] * 4]


async def test_session_turn_and_ledger_are_read_together(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await owner.begun("t2")
    await owner.write(5)
    found = await context(store, "ses_f", "t2", 2)
    assert found.session == await store.get_session("ses_f")
    assert found.turn == await store.get_turn("ses_f", "t2")
    assert found.ledger == LedgerPiece(2, owner.tokens[2:])
    assert (await context(store, "ses_f", "t1")).ledger == LedgerPiece(0, owner.tokens)
    assert (await context(store, "ses_f", "none", 8)).turn is None
    assert (await context(store, "ses_f", "none", 8)).ledger == LedgerPiece(8, [])
    assert (await context(store, "ses_f", "none", 99)).ledger.tokens == []


async def test_a_context_brings_a_bounded_piece_of_the_ledger(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun("t1", range(READ_PIECE_TOKENS + 3))
    found = await context(store, "ses_f", "t1")
    assert found.ledger.end == READ_PIECE_TOKENS
    head = found.session.head.length
    assert await store.read_tokens(found.session, 0, head, found.ledger) == owner.tokens


async def test_a_context_of_a_fork_brings_its_own_part_of_the_ledger(store: RedisStore) -> None:
    await (await Owner.of(store)).run_turn("t1", [4])
    await store.fork("ses_f", "ses_f.c", None, ())
    child = await Owner.of(store, "ses_f.c")
    await child.run_turn("t2", [5])
    found = await context(store, "ses_f.c", "t2")
    assert found.ledger == LedgerPiece(4, child.tokens[4:])
    for start in range(9):
        for end in range(start, 9):
            read = await store.read_tokens(found.session, start, end, found.ledger)
            assert read == child.tokens[start:end]


async def test_a_read_of_large_turns_stops_and_can_go_on(store: RedisStore) -> None:
    # Two sessions of two turns, so that what is missing is in the middle.
    large = b"x" * (MAX_TURN_BYTES_PER_READ // 2 + 1)
    for session_id, child_id in (("ses_f", "ses_f.c"), ("ses_f.c", "ses_f.d")):
        owner = await Owner.of(store, session_id)
        for number in range(4):
            await owner.begun(f"t{number}")
            usage = TurnResult(TurnStatus.COMMITTED, FinishReason.STOP, usage=large)
            await owner.write(commit=usage)
        await store.fork(session_id, child_id, None, ())
    session = await session_of(store, "ses_f.d")
    found: list[Turn] = []
    while some := await store.get_turns(session, len(found), 100):
        assert len(some) <= 4
        found += some
    assert [turn.index for turn in found] == list(range(8))


@pytest.mark.parametrize("session_id", ["ses_unknown", "nonsense"])
async def test_an_unknown_session_has_no_context(store: RedisStore, session_id: str) -> None:
    assert await store.get_turn_context(session_id, "t1", 0) is None


async def test_a_resume_answers_with_what_it_changed(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await owner.write(4)
    await store.take("ses_f", owner.epoch, B, b"nonce")
    epoch = (await context(store, "ses_f", "t1")).session.epoch
    outcome = await store.resume_turn("ses_f", epoch, "t1")
    assert isinstance(outcome, TurnResumed)
    assert outcome.session == await store.get_session("ses_f")
    assert outcome.turn == await store.get_turn("ses_f", "t1")
    assert outcome.turn.output_end == position_of(owner.tokens)
