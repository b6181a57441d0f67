"""Forks share their ancestors' tokens."""

from __future__ import annotations

import pytest

from statestore.ports import HeadMismatch, Refused, SessionWritten, TurnBegun
from statestore.records import NO_EPOCH, Segment, Session, SessionState, StoreLimits, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.owners import EMPTY, FINGERPRINT, TENANT, A, Owner, opened, position_of
from tests.support.stores import Backend, store_on

pytestmark = pytest.mark.anyio


async def forked(store: RedisStore, parent: str, child: str, at: int | None = None) -> Session:
    outcome = await store.fork(parent, child, at, (("branch", child),))
    assert isinstance(outcome, SessionWritten)
    return outcome.session


async def tokens_of(store: RedisStore, session_id: str) -> list[int]:
    session = await store.get_session(session_id)
    assert session is not None
    return await store.read_tokens(session, 0, 1 << 30)


async def test_a_fork_has_its_parents_ledger_and_turns_and_no_owner(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await owner.run_turn("t2", [5])
    child = await forked(store, "ses_f", "ses_f.c")
    assert child == await store.get_session("ses_f.c")
    assert (child.head, child.turn_index, child.own_base) == (owner.head, 2, 8)
    assert child.segments == (Segment("ses_f", 0, 8),)
    assert (child.owner, child.epoch, child.active_turn_id) == (None, NO_EPOCH, None)
    assert (child.parent_id, child.previous_owner) == ("ses_f", A)
    assert (child.tenant, child.model, child.token_fingerprint) == (TENANT, "m", FINGERPRINT)
    assert (child.preamble, child.leading_digest) == (b"\x00preamble\xff", b"leading")
    assert child.labels == (("branch", "ses_f.c"),)
    assert await tokens_of(store, "ses_f.c") == owner.tokens
    assert await store.get_turns("ses_f.c", 0, 9) == await store.get_turns("ses_f", 0, 9)


async def test_parent_and_fork_grow_apart(store: RedisStore) -> None:
    parent = await Owner.of(store)
    await parent.run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    child = await Owner.of(store, "ses_f.c")
    assert child.tokens == parent.tokens
    await parent.run_turn("t2", [5])
    await child.run_turn("t2", [6])
    assert await tokens_of(store, "ses_f") == [1, 2, 3, 4, 1, 2, 3, 5]
    assert await tokens_of(store, "ses_f.c") == [1, 2, 3, 4, 1, 2, 3, 6]
    session = await store.get_session("ses_f.c")
    assert session is not None
    assert await store.read_tokens(session, 2, 6) == [3, 4, 1, 2]


async def test_forking_again_with_the_same_id_finds_the_fork(store: RedisStore) -> None:
    parent = await Owner.of(store)
    await parent.run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    child = await Owner.of(store, "ses_f.c")
    await child.begun("t2")
    again = await forked(store, "ses_f", "ses_f.c")
    assert again.active_turn_id == "t2"
    await forked(store, "ses_f.c", "ses_f.d")
    assert await store.fork("ses_f.d", "ses_f.c", None, ()) == Refused(SessionState.OPEN, "t2")


async def test_a_fork_can_be_made_at_any_turn_boundary(store: RedisStore) -> None:
    owner = await Owner.of(store)
    for turn in (1, 2, 3):
        await owner.run_turn(f"t{turn}", [turn + 6])
    for at in range(4):
        child = await forked(store, "ses_f", f"ses_f.c{at}", at)
        assert child.turn_index == at
        assert child.head == position_of(owner.tokens[: 4 * at])
        assert await tokens_of(store, f"ses_f.c{at}") == owner.tokens[: 4 * at]
        assert len(await store.get_turns(f"ses_f.c{at}", 0, 9)) == at
    assert await store.fork("ses_f", "ses_f.x", 4, ()) == HeadMismatch(owner.head, owner.epoch)
    assert await store.fork("ses_f", "ses_f.x", -1, ()) == HeadMismatch(owner.head, owner.epoch)


async def test_a_fork_of_an_empty_session_is_empty(store: RedisStore) -> None:
    await opened(store)
    child = await forked(store, "ses_f", "ses_f.c")
    assert (child.head, child.segments, child.own_base) == (EMPTY, (), 0)


async def test_a_busy_session_is_forked_at_its_last_turn_boundary(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await owner.begun("t2")
    await owner.write(5)
    child = await forked(store, "ses_f", "ses_f.c")
    assert (child.turn_index, child.active_turn_id) == (1, None)
    assert await tokens_of(store, "ses_f.c") == [1, 2, 3, 4]


async def test_a_fork_after_a_cancelled_turn_has_its_tokens(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.begun("t1")
    await owner.write(4)
    await store.cancel_turn("ses_f", "t1")
    child = await forked(store, "ses_f", "ses_f.c")
    assert child.head == owner.head
    (turn,) = await store.get_turns("ses_f.c", 0, 9)
    assert turn.status is TurnStatus.CANCELLED


async def test_chains_of_forks_are_flattened(store: RedisStore) -> None:
    tokens: list[int] = []
    session_id = "ses_f"
    for generation in range(4):
        owner = await Owner.of(store, session_id)
        await owner.run_turn(f"t{generation}", [generation])
        tokens = owner.tokens
        child_id = f"ses_f.{generation}"
        child = await forked(store, session_id, child_id)
        session_id = child_id
    assert child.segments == (
        Segment("ses_f", 0, 4),
        Segment("ses_f.0", 4, 8),
        Segment("ses_f.1", 8, 12),
        Segment("ses_f.2", 12, 16),
    )
    assert await tokens_of(store, session_id) == tokens
    # At a boundary inside an ancestor, nothing after it is inherited.
    early = await forked(store, session_id, "ses_f.early", 2)
    assert early.segments == child.segments[:2]
    assert await tokens_of(store, "ses_f.early") == tokens[:8]


async def test_a_fork_of_too_many_ancestors_copies_instead(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_segments=2))
    session_id = "ses_f"
    for generation in range(3):
        owner = await Owner.of(store, session_id)
        await owner.run_turn(f"t{generation}", [generation])
        child = await forked(store, session_id, f"ses_f.{generation}")
        session_id = f"ses_f.{generation}"
    assert (child.segments, child.own_base) == ((), 0)
    assert await tokens_of(store, session_id) == owner.tokens
    owner = await Owner.of(store, session_id)
    await owner.run_turn("t9", [9])
    assert await tokens_of(store, session_id) == owner.tokens
    await forked(store, session_id, "ses_f.last")
    assert await tokens_of(store, "ses_f.last") == owner.tokens


async def test_a_parent_can_go_before_its_forks(backend: Backend, store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    await forked(store, "ses_f.c", "ses_f.d")
    await store.close("ses_f", 0)
    await store.close("ses_f.c", 0)
    assert await store.get_session("ses_f") is None
    assert await tokens_of(store, "ses_f.d") == owner.tokens
    child = await Owner.of(store, "ses_f.d")
    assert isinstance(await child.begin("t2"), TurnBegun)
    grandchild = await forked(store, "ses_f.d", "ses_f.e")
    assert grandchild.segments == (Segment("ses_f", 0, 4),)
    await store.close("ses_f.d", 0)
    assert await tokens_of(store, "ses_f.e") == owner.tokens
    await store.close("ses_f.e", 0)
    assert not any("{f}" in key for key in await backend.keys())


async def test_a_fork_of_a_suspended_session_is_open(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await store.suspend("ses_f")
    child = await forked(store, "ses_f", "ses_f.c")
    assert child.state is SessionState.OPEN
    assert child.previous_owner == A


async def test_a_fork_is_listed_for_its_tenant(store: RedisStore) -> None:
    await opened(store)
    await forked(store, "ses_f", "ses_f.c")
    page = await store.list_sessions(TENANT, "", 10)
    assert [session.session_id for session in page.sessions] == ["ses_f.c", "ses_f"]


async def test_a_fork_stays_in_its_family(store: RedisStore) -> None:
    await opened(store)
    with pytest.raises(ValueError, match="family"):
        await store.fork("ses_f", "ses_g.c", None, ())
