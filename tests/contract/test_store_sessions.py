"""Opening, reading, listing, suspending, closing and purging sessions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from statestore import keys
from statestore.ports import (
    Appended,
    Fenced,
    Missing,
    Refused,
    SessionWritten,
    StoreCorrupt,
    TurnEnded,
    TurnUnknown,
)
from statestore.records import (
    NO_EPOCH,
    FinishReason,
    Session,
    SessionState,
    StoreLimits,
    TurnStatus,
)
from statestore.redis_store import RedisStore
from tests.support.owners import EMPTY, STOP, TENANT, A, B, Owner, new_session, opened, session_of
from tests.support.stores import ANSWERING, Backend, forgotten, raw, store_on

pytestmark = pytest.mark.anyio


async def test_a_new_session_reads_back_as_it_was_asked_for(store: RedisStore) -> None:
    session = await opened(store)
    assert session == await store.get_session("ses_f")
    assert (session.session_id, session.tenant, session.model) == ("ses_f", TENANT, "m")
    assert session.state is SessionState.OPEN
    assert session.owner is None
    assert session.epoch == NO_EPOCH
    assert session.head == EMPTY
    assert (session.turn_index, session.active_turn_id) == (0, None)
    assert (session.segments, session.own_base, session.parent_id) == ((), 0, None)
    assert session.preamble == b"\x00preamble\xff"
    assert session.leading_digest == b"leading"
    assert session.labels == (("job", "a:b,c"), ("näme", ""))
    assert session.created_at_ms == session.updated_at_ms > 0
    assert session.version == 1


async def test_opening_again_finds_the_session(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    outcome = await store.open_session(new_session())
    assert isinstance(outcome, SessionWritten)
    assert outcome.session.active_turn_id == "t1"
    assert outcome.session.head.length == 3


@pytest.mark.parametrize("session_id", ["ses_unknown", "nonsense", "ses_{x}", ""])
async def test_an_unknown_id_has_no_session(store: RedisStore, session_id: str) -> None:
    assert await store.get_session(session_id) is None


async def test_writes_to_an_unknown_session_find_it_missing(store: RedisStore) -> None:
    assert await store.place("ses_x", NO_EPOCH, A, b"nonce") == Missing()
    assert await store.take("ses_x", NO_EPOCH, None, b"nonce") == Missing()
    assert await store.resume_turn("ses_x", NO_EPOCH, "t1") == Missing()
    assert await store.cancel_turn("ses_x", "t1") == Missing()
    assert await store.suspend("ses_x") == Missing()
    assert await store.close("ses_x", None) == Missing()
    assert await store.fork("ses_x", "ses_x.y", None, ()) == Missing()
    assert await store.begin_migration("ses_x", NO_EPOCH, "m", A, 1000) == Missing()
    assert await store.switch_migration("ses_x", NO_EPOCH, "m", EMPTY, None, b"n") == Missing()
    await store.abort_migration("ses_x", "m")
    owner = Owner(store, "ses_x", A, NO_EPOCH)
    assert await owner.begin() == Missing()
    assert await owner.write() == Missing()
    assert await store.repair(owner.repair(EMPTY, NO_EPOCH, keep=0)) == Missing()
    assert await store.get_turn("ses_x", "t1") is None


async def test_each_write_of_the_record_raises_its_version(store: RedisStore) -> None:
    owner = await Owner.of(store)
    versions = []
    for step in range(3):
        await (owner.begin() if step == 0 else owner.write(step))
        session = await store.get_session("ses_f")
        assert session is not None
        versions.append(session.version)
    assert versions == sorted(set(versions))


async def test_a_suspended_session_has_no_owner_and_takes_no_turn(store: RedisStore) -> None:
    owner = await Owner.of(store)
    outcome = await store.suspend("ses_f")
    assert isinstance(outcome, SessionWritten)
    assert await store.suspend("ses_f") == outcome
    assert outcome.session.state is SessionState.SUSPENDED
    assert (outcome.session.owner, outcome.session.previous_owner) == (None, A)
    suspended = Refused(SessionState.SUSPENDED)
    assert await owner.begin() == suspended
    assert await store.place("ses_f", owner.epoch, A, b"other") == suspended
    assert await store.take("ses_f", owner.epoch, A, b"other") == suspended
    assert await store.begin_migration("ses_f", owner.epoch, "m", A, 1000) == suspended


async def test_an_owner_from_before_a_suspension_is_fenced(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await store.suspend("ses_f")
    outcome = await store.unsuspend("ses_f")
    assert isinstance(outcome, SessionWritten)
    assert outcome.session.state is SessionState.OPEN
    assert isinstance(await owner.begin(), Fenced)
    assert (await Owner.of(store)).epoch > owner.epoch


async def test_a_busy_session_is_not_suspended(store: RedisStore) -> None:
    await (await Owner.of(store)).begun()
    assert await store.suspend("ses_f") == Refused(SessionState.OPEN, "t1")


async def test_closing_cancels_the_turn_and_ends_ownership(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun()
    await owner.write(7)
    outcome = await store.close("ses_f", None)
    assert isinstance(outcome, SessionWritten)
    session = outcome.session
    assert session.state is SessionState.CLOSED
    assert (session.owner, session.previous_owner) == (None, A)
    assert session.active_turn_id is None
    ended = await owner.write(8)
    assert isinstance(ended, TurnEnded)
    assert ended.turn.status is TurnStatus.CANCELLED
    assert ended.turn.result is not None
    assert ended.turn.result.reason is FinishReason.CANCELLED
    assert ended.turn.output_end.length == 4


async def test_a_closed_session_refuses_everything_but_reads(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [7])
    await store.close("ses_f", None)
    closed = Refused(SessionState.CLOSED)
    assert await owner.begin("t2") == closed
    assert await store.place("ses_f", owner.epoch, A, b"other") == closed
    assert await store.take("ses_f", owner.epoch, A, b"other") == closed
    assert await store.suspend("ses_f") == closed
    assert await store.unsuspend("ses_f") == closed
    assert await store.fork("ses_f", "ses_f.c", None, ()) == closed
    assert await store.begin_migration("ses_f", owner.epoch, "m", A, 1000) == closed
    assert await store.switch_migration("ses_f", owner.epoch, "m", EMPTY, None, b"n") == closed
    assert await store.repair(owner.repair(EMPTY, NO_EPOCH, keep=0)) == closed
    assert await store.cancel_turn("ses_f", "unknown") == TurnUnknown()
    session = await store.get_session("ses_f")
    assert session is not None
    assert await store.read_tokens(session, 0, 4) == [1, 2, 3, 7]
    assert [turn.status for turn in await store.get_turns(session, 0, 9)] == [TurnStatus.COMMITTED]


async def test_closing_again_changes_nothing(store: RedisStore) -> None:
    await opened(store)
    outcome = await store.close("ses_f", None)
    assert await store.close("ses_f", None) == outcome


async def test_closing_without_retention_leaves_nothing_behind(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(purged_ttl_ms=0, index_grace_ms=0))
    before = await backend.keys()
    owner = await Owner.of(store)
    await owner.run_turn("t1", [7])
    outcome = await store.close("ses_f", 0)
    assert isinstance(outcome, SessionWritten)
    assert outcome.session.head == owner.head
    assert await store.get_session("ses_f") is None
    assert await store.close("ses_f", 0) == Missing()
    await forgotten(backend, store)
    left = {key for key in await backend.keys() if not key.startswith("sessile:replica-sessions:")}
    assert left == before


@ANSWERING
async def test_a_closed_session_is_purged_by_the_sweep_when_its_retention_ends(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(default_retention_ms=0))
    await opened(store, "ses_kept")
    await store.close("ses_kept", 60_000)
    await opened(store, "ses_gone")
    saved = await backend.save()
    await store.close("ses_gone", 0)
    assert await store.get_session("ses_gone") is None
    # A gateway that died between the close and the purge.
    await backend.roll_back(saved)
    await store_on(backend).close("ses_gone", 1)
    gone: list[str] = []
    while not gone:
        gone += (await store.sweep(10)).sessions_purged
    assert gone == ["ses_gone"]
    assert await store.get_session("ses_gone") is None
    assert await store.get_session("ses_kept") is not None


async def test_retention_is_bounded_and_can_be_shortened(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_retention_ms=0))
    await opened(store)
    await store.close("ses_f", 10**12)
    assert await store.get_session("ses_f") is None
    await opened(store, "ses_g")
    await store_on(backend).close("ses_g", 60_000)
    await store.close("ses_g", 0)
    assert await store.get_session("ses_g") is None


async def until_purged(store: RedisStore) -> None:
    while await store.get_session("ses_f") is not None:
        await store.sweep(10)


@pytest.mark.parametrize("retention_ms", [0, 1])
async def test_a_late_repeat_does_not_open_a_purged_session_anew(
    backend: Backend, store: RedisStore, retention_ms: int
) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [7])
    await store.close("ses_f", retention_ms)
    await until_purged(store)
    for _ in range(3):
        assert await store.open_session(new_session()) == Refused(SessionState.CLOSED)
        await store.sweep(10)
    assert await store.get_session("ses_f") is None
    assert await store.find_or_admit(TENANT, "ses_f", 0) is None
    assert (await store.list_sessions(TENANT, "", 10)).sessions == ()
    assert await store.close("ses_f", 0) == Missing()
    assert await owner.begin("t2") == Missing()
    assert await store.take("ses_f", owner.epoch, B, b"n") == Missing()
    # All that is left of it.
    assert {key for key in await backend.keys() if "{f}" in key} == {keys.refs_key("ses_f")}
    assert await backend.fields(keys.refs_key("ses_f")) == {b"gone:ses_f"}


async def test_a_purge_is_forgotten_when_no_repeat_is_to_be_feared_any_more(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(purged_ttl_ms=0))
    for _ in range(2):
        await opened(store)
        await store.close("ses_f", 0)
        await forgotten(backend, store)
        assert not any("{f}" in key for key in await backend.keys())
        await opened(store)
        await store.close("ses_f", 1)
        await until_purged(store)
        await forgotten(backend, store)
        assert not any("{f}" in key for key in await backend.keys())


async def test_a_purge_that_the_store_lost_is_made_again(backend: Backend) -> None:
    store = store_on(backend)
    session = await opened(store)
    await store_on(backend).close("ses_f", 1)
    saved = await backend.save()
    await until_purged(store)
    await backend.roll_back(saved)
    assert (await opened(store)).created_at_ms == session.created_at_ms
    await until_purged(store)
    assert await store.open_session(new_session()) == Refused(SessionState.CLOSED)


async def test_sessions_of_a_tenant_are_listed_newest_first_in_pages(store: RedisStore) -> None:
    for name in "abcde":
        await opened(store, f"ses_{name}")
    await store.open_session(new_session("ses_other", tenant="another"))
    await opened(store, "ses_a")  # a retry keeps its place
    listed, cursor = [], ""
    for _ in range(3):
        page = await store.list_sessions(TENANT, cursor, 2)
        listed.append([session.session_id for session in page.sessions])
        cursor = page.next_cursor
    assert listed == [["ses_e", "ses_d"], ["ses_c", "ses_b"], ["ses_a"]]
    assert cursor == ""


async def test_a_purged_session_is_not_listed(store: RedisStore) -> None:
    await opened(store, "ses_a")
    await opened(store, "ses_b")
    await store.close("ses_b", 0)
    page = await store.list_sessions(TENANT, "", 10)
    assert [session.session_id for session in page.sessions] == ["ses_a"]


async def test_a_malformed_cursor_is_refused(store: RedisStore) -> None:
    with pytest.raises(ValueError, match="cursor"):
        await store.list_sessions(TENANT, "x", 10)


CALLS: dict[str, Callable[[RedisStore, Owner], Awaitable[object]]] = {
    "open": lambda store, owner: store.open_session(new_session()),
    "get_session": lambda store, owner: store.get_session("ses_f"),
    "get_turn": lambda store, owner: store.get_turn("ses_f", "t1"),
    "get_turn_context": lambda store, owner: store.get_turn_context("ses_f", "t1", 0),
    "place": lambda store, owner: store.place("ses_f", owner.epoch, B, b"n"),
    "take": lambda store, owner: store.take("ses_f", owner.epoch, B, b"n"),
    "begin": lambda store, owner: owner.begin("t2"),
    "resume": lambda store, owner: store.resume_turn("ses_f", owner.epoch, "t1"),
    "repair": lambda store, owner: store.repair(owner.repair(owner.head, owner.epoch, keep=4)),
    "cancel": lambda store, owner: store.cancel_turn("ses_f", "t1"),
    "suspend": lambda store, owner: store.suspend("ses_f"),
    "close": lambda store, owner: store.close("ses_f", None),
    "fork": lambda store, owner: store.fork("ses_f", "ses_f.c", None, ()),
    "begin_migration": lambda store, owner: store.begin_migration(
        "ses_f", owner.epoch, "m", B, 1000
    ),
    "switch_migration": lambda store, owner: store.switch_migration(
        "ses_f", owner.epoch, "m", owner.head, "t1", b"n"
    ),
    "abort_migration": lambda store, owner: store.abort_migration("ses_f", "m"),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_record_for_newer_readers_is_neither_read_nor_written(
    backend: Backend, call: str
) -> None:
    store = store_on(backend)
    owner = await Owner.of(store)
    await owner.begun()
    await owner.write(4)
    session = await session_of(store, "ses_f")
    await store.begin_migration("ses_f", owner.epoch, "m", B, 60_000)
    key = keys.session_key("ses_f")
    await raw(backend, key, "HSET", "min_reader", 99)
    before = await raw(backend, key, "HGETALL")
    with pytest.raises(StoreCorrupt, match="schema 99"):
        await CALLS[call](store, owner)
    with pytest.raises(StoreCorrupt, match="schema 99"):
        await store.get_turns(session, 0, 9)
    other = await Owner.of(store, "ses_g")
    await other.begun()
    group = [owner.append(5, commit=STOP), other.append(6)]
    unread, appended = await store.append_many(group)
    assert isinstance(unread, StoreCorrupt)
    assert appended == Appended(other.head)
    assert await raw(backend, key, "HGETALL") == before
    await raw(backend, key, "HSET", "min_reader", 1)
    assert await store.fork("ses_f", "ses_f.d", None, ())
    await raw(backend, keys.session_key("ses_f.d"), "HSET", "min_reader", 99)
    with pytest.raises(StoreCorrupt, match="schema 99"):
        await store.fork("ses_f", "ses_f.d", None, ())


async def test_a_purge_looks_itself_whether_it_is_due(store: RedisStore) -> None:
    session = await opened(store)
    assert not await store._purge(session)
    await store.close("ses_f", 60_000)
    assert not await store._purge(session)
    assert (await session_of(store, "ses_f")).state is SessionState.CLOSED


async def test_a_session_purged_in_the_midst_of_its_fork_is_missing(backend: Backend) -> None:
    store, late = store_on(backend), store_on(backend)
    session = await opened(store)

    async def as_it_was(session_id: str) -> Session:
        return session

    late.get_session = as_it_was  # type: ignore[method-assign]
    await store.close("ses_f", 0)
    assert await late.fork("ses_f", "ses_f.c", None, ()) == Missing()
    assert await store.get_session("ses_f.c") is None


async def test_a_cancel_leaves_no_tombstone_in_a_closed_session(backend: Backend) -> None:
    store = store_on(backend)
    await opened(store)
    await store.close("ses_f", 60_000)
    before = await raw(backend, keys.session_key("ses_f"), "HGETALL")
    assert await store.cancel_turn("ses_f", "t1") == TurnUnknown()
    assert await raw(backend, keys.session_key("ses_f"), "HGETALL") == before


async def test_closing_or_moving_an_idle_session_ends_and_interrupts_no_turn(
    backend: Backend,
) -> None:
    store = store_on(backend)
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await store.begin_migration("ses_f", owner.epoch, "m", B, 60_000)
    await store.switch_migration("ses_f", owner.epoch, "m", owner.head, None, b"n")
    closed = await store.close("ses_f", 60_000)
    assert isinstance(closed, SessionWritten)
    assert closed.session.turn_index == 1
    fields = await backend.fields(keys.session_key("ses_f"))
    assert not any(field.startswith(b"t::") for field in fields)


@ANSWERING
async def test_closing_ends_an_overdue_turn_as_overdue(backend: Backend) -> None:
    store = store_on(backend)
    owner = await Owner.of(store)
    await owner.begin(timeout_ms=0)
    await store.close("ses_f", 60_000)
    turn = await store.get_turn("ses_f", "t1")
    assert turn is not None
    assert turn.result is not None
    assert (turn.status, turn.result.reason) == (TurnStatus.FAILED, FinishReason.DEADLINE)
    assert (await session_of(store, "ses_f")).turn_index == 1


@ANSWERING
async def test_a_closed_session_looked_at_early_is_due_when_its_retention_ends(
    backend: Backend,
) -> None:
    store = store_on(backend)
    await opened(store)
    await store.close("ses_f", 60_000)
    await raw(backend, keys.DUE, "ZADD", 1, "ses_f")
    assert (await store.sweep(10)).examined == 1
    assert (await store.sweep(10)).examined == 0
