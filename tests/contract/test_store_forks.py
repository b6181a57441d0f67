"""Forks share their ancestors' tokens."""

from __future__ import annotations

import itertools

import pytest

from statestore import keys
from statestore.ports import HeadMismatch, Missing, Refused, SessionWritten, TurnBegun, TurnEnded
from statestore.records import NO_EPOCH, Segment, Session, SessionState, StoreLimits, TurnStatus
from statestore.redis_store import RedisStore
from tests.support.owners import (
    EMPTY,
    FINGERPRINT,
    STOP,
    TENANT,
    A,
    Owner,
    new_session,
    opened,
    position_of,
    session_of,
)
from tests.support.stores import Backend, forgotten, store_on

pytestmark = pytest.mark.anyio


async def forked(store: RedisStore, parent: str, child: str, at: int | None = None) -> Session:
    outcome = await store.fork(parent, child, at, (("branch", child),))
    assert isinstance(outcome, SessionWritten)
    return outcome.session


async def tokens_of(store: RedisStore, session_id: str) -> list[int]:
    return await store.read_tokens(await session_of(store, session_id), 0, 1 << 30)


async def turn_ids(store: RedisStore, session_id: str) -> list[str]:
    turns = await store.get_turns(await session_of(store, session_id), 0, 1000)
    assert [turn.index for turn in turns] == list(range(len(turns)))
    return [turn.spec.turn_id for turn in turns]


async def test_a_fork_has_its_parents_ledger_and_turns_and_no_owner(store: RedisStore) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await owner.run_turn("t2", [5])
    child = await forked(store, "ses_f", "ses_f.c")
    assert child == await store.get_session("ses_f.c")
    assert (child.head, child.turn_index, child.own_base) == (owner.head, 2, 8)
    assert child.segments == (Segment("ses_f", 0, 8, 0, 2),)
    assert (child.owner, child.epoch, child.active_turn_id) == (None, NO_EPOCH, None)
    assert (child.parent_id, child.previous_owner) == ("ses_f", A)
    assert (child.tenant, child.model, child.token_fingerprint) == (TENANT, "m", FINGERPRINT)
    assert (child.preamble, child.leading_digest) == (b"\x00preamble\xff", b"leading")
    assert child.labels == (("branch", "ses_f.c"),)
    assert await tokens_of(store, "ses_f.c") == owner.tokens
    assert await store.get_turns(await session_of(store, "ses_f.c"), 0, 9) == await store.get_turns(
        await session_of(store, "ses_f"), 0, 9
    )


@pytest.mark.parametrize("at", [None, 150])
async def test_a_fork_is_as_small_however_many_turns_it_inherits(
    backend: Backend, store: RedisStore, at: int | None
) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t0", [4])
    await forked(store, "ses_f", "ses_f.short")
    for turn in range(1, 200):
        await owner.run_turn(f"t{turn}", [4])
    await forked(store, "ses_f", "ses_f.long", at)
    short = await backend.fields(keys.session_key("ses_f.short"))
    assert await backend.fields(keys.session_key("ses_f.long")) == short
    assert await turn_ids(store, "ses_f.long") == [f"t{turn}" for turn in range(at or 200)]
    assert len(await tokens_of(store, "ses_f.long")) == 4 * (at or 200)


async def test_ids_of_inherited_turns_are_not_ids_of_the_fork(store: RedisStore) -> None:
    await (await Owner.of(store)).run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    assert await store.get_turn("ses_f.c", "t1") is None
    child = await Owner.of(store, "ses_f.c")
    await child.run_turn("t1", [5])
    assert await turn_ids(store, "ses_f.c") == ["t1", "t1"]
    first, second = await store.get_turns(await session_of(store, "ses_f.c"), 0, 9)
    assert (first.output_end.length, second.output_end) == (4, child.head)
    assert await store.get_turns(await session_of(store, "ses_f.c"), 1, 9) == (second,)
    assert await store.cancel_turn("ses_f.c", "t1") == TurnEnded(second)


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
        assert len(await store.get_turns(await session_of(store, f"ses_f.c{at}"), 0, 9)) == at
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
    (turn,) = await store.get_turns(await session_of(store, "ses_f.c"), 0, 9)
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
        Segment("ses_f", 0, 4, 0, 1),
        Segment("ses_f.0", 4, 8, 1, 2),
        Segment("ses_f.1", 8, 12, 2, 3),
        Segment("ses_f.2", 12, 16, 3, 4),
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


async def test_turns_of_one_id_stay_apart_when_they_are_copied(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(max_segments=1))
    for session_id, child_id in (("ses_f", "ses_f.c"), ("ses_f.c", "ses_f.d")):
        await (await Owner.of(store, session_id)).run_turn("t", [])
        copied = await forked(store, session_id, child_id)
    assert copied.segments == ()
    assert await store.get_turn("ses_f.d", "t") is None
    await (await Owner.of(store, "ses_f.d")).run_turn("t", [7])
    turns = await store.get_turns(await session_of(store, "ses_f.d"), 0, 9)
    assert [turn.output_end.length for turn in turns] == [3, 6, 10]
    await store.close("ses_f", 0)
    await store.close("ses_f.c", 0)
    boundary = await forked(store, "ses_f.d", "ses_f.e", 1)
    assert boundary.head == turns[0].output_end
    assert await store.get_turns(boundary, 0, 9) == turns[:1]


async def test_turns_without_tokens_are_inherited(backend: Backend) -> None:
    for limit in (32, 1):
        store = store_on(backend, StoreLimits(max_segments=limit))
        root = f"ses_l{limit}"
        for session_id, child_id in ((root, f"{root}.c"), (f"{root}.c", f"{root}.d")):
            owner = await Owner.of(store, session_id)
            await owner.begun(session_id[-1], ())
            await owner.write(commit=STOP)
            await forked(store, session_id, child_id)
        assert await tokens_of(store, f"{root}.d") == []
        for gone in (root, f"{root}.c"):
            await store.close(gone, 0)
        assert await turn_ids(store, f"{root}.d") == [root[-1], "c"]


@pytest.mark.parametrize("max_segments", [32, 2])
async def test_sessions_of_a_family_can_go_in_any_order(
    backend: Backend, max_segments: int
) -> None:
    """Forks of forks, the last two at inherited boundaries."""
    store = store_on(backend, StoreLimits(max_segments=max_segments, purged_ttl_ms=0))
    orders = itertools.islice(itertools.permutations(range(5)), 0, None, 7)
    for number, order in enumerate(orders):
        root = f"ses_{number}"
        ids = [root, f"{root}.a", f"{root}.b", f"{root}.c", f"{root}.d"]
        for parent, child in itertools.pairwise(ids[:3]):
            owner = await Owner.of(store, parent)
            await owner.run_turn("t1", [5])
            await owner.run_turn("t2", [6])
            await forked(store, parent, child)
        await (await Owner.of(store, ids[2])).run_turn("t1", [7])
        await forked(store, ids[2], ids[3], 3)
        await forked(store, ids[3], ids[4], 1)
        tokens = {it: await tokens_of(store, it) for it in ids}
        turns = {it: await store.get_turns(await session_of(store, it), 0, 99) for it in ids}
        assert [len(turns[it]) for it in ids] == [2, 4, 5, 3, 1]
        for place in order:
            gone = ids[place]
            del tokens[gone]
            await store.close(gone, 0)
            assert await store.get_session(gone) is None
            for left, expected in tokens.items():
                assert await tokens_of(store, left) == expected
                session = await session_of(store, left)
                assert await store.get_turns(session, 0, 99) == turns[left]
        await forgotten(backend, store, root)
        assert not any(f"{{{number}}}" in key for key in await backend.keys())


async def test_a_fork_of_a_fork_outlives_both(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(purged_ttl_ms=0))
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    await forked(store, "ses_f.c", "ses_f.d")
    await store.close("ses_f", 0)
    await store.close("ses_f.c", 0)
    child = await Owner.of(store, "ses_f.d")
    assert isinstance(await child.begin("t2"), TurnBegun)
    grandchild = await forked(store, "ses_f.d", "ses_f.e")
    assert grandchild.segments == (Segment("ses_f", 0, 4, 0, 1),)
    await store.close("ses_f.d", 0)
    assert await tokens_of(store, "ses_f.e") == owner.tokens
    await store.close("ses_f.e", 0)
    await forgotten(backend, store)
    assert not any("{f}" in key for key in await backend.keys())


async def test_a_purge_leaves_no_more_than_forks_refer_to(
    backend: Backend, store: RedisStore
) -> None:
    owner = await Owner.of(store)
    await owner.run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    await owner.run_turn("t2", [5])
    await store.cancel_turn("ses_f", "t3")
    session = await session_of(store, "ses_f")
    await store.close("ses_f", 0)
    fields = await backend.fields(keys.session_key("ses_f"))
    rest = sorted(name for name in fields if not name.startswith(b"t:t1:"))
    assert rest == [b"min_reader", b"state", b"ti:0"]
    assert await store.read_tokens(session, 0, 8) == [1, 2, 3, 4]
    assert await store.close("ses_f", 0) == Missing()
    assert await store.fork("ses_f", "ses_f.d", None, ()) == Missing()
    assert await owner.begin("t4") == Missing()


async def test_what_forks_still_refer_to_is_not_made_anew(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(purged_ttl_ms=0))
    await (await Owner.of(store)).run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    await (await Owner.of(store, "ses_f.c")).run_turn("t2", [5])
    await forked(store, "ses_f.c", "ses_f.d")
    tokens = await tokens_of(store, "ses_f.d")
    await store.close("ses_f", 0)
    await forgotten(backend, store)
    assert await store.open_session(new_session()) == Refused(SessionState.CLOSED)
    await store.close("ses_f.c", 0)
    await forgotten(backend, store)
    assert await store.fork("ses_f.d", "ses_f.c", None, ()) == Refused(SessionState.CLOSED)
    assert await tokens_of(store, "ses_f.d") == tokens
    assert await turn_ids(store, "ses_f.d") == ["t1", "t2"]
    await store.close("ses_f.d", 0)
    await forgotten(backend, store)
    assert isinstance(await store.open_session(new_session()), SessionWritten)


async def test_a_late_repeat_does_not_fork_a_purged_session_anew(
    backend: Backend, store: RedisStore
) -> None:
    await (await Owner.of(store)).run_turn("t1", [4])
    await forked(store, "ses_f", "ses_f.c")
    await (await Owner.of(store, "ses_f.c")).run_turn("t2", [5])
    await forked(store, "ses_f.c", "ses_f.d")
    for gone, parent in (("ses_f.c", "ses_f"), ("ses_f.d", "ses_f.c")):
        await store.close(gone, 0)
        closed = Refused(SessionState.CLOSED) if parent == "ses_f" else Missing()
        assert await store.fork(parent, gone, None, ()) == closed
        assert await store.get_session(gone) is None
    # Now that nobody refers to it any more, too.
    assert await store.fork("ses_f", "ses_f.c", None, ()) == Refused(SessionState.CLOSED)
    assert (await forked(store, "ses_f", "ses_f.e")).turn_index == 1
    await store.close("ses_f.e", 0)
    await store.close("ses_f", 0)
    assert await store.open_session(new_session()) == Refused(SessionState.CLOSED)
    assert await store.fork("ses_f", "ses_f.e", None, ()) == Missing()
    assert {key for key in await backend.keys() if "{f}" in key} == {keys.refs_key("ses_f")}


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


async def test_a_copy_of_turns_without_tokens_takes_none_of_what_came_later(
    backend: Backend,
) -> None:
    store = store_on(backend, StoreLimits(max_segments=0))
    owner = await Owner.of(store)
    await owner.begun("t1", ())
    await owner.write(commit=STOP)
    await owner.run_turn("t2", [4, 5])
    await forked(store, "ses_f", "ses_f.c", 1)
    child = await Owner.of(store, "ses_f.c")
    await child.begun("t3", (7,))
    assert await tokens_of(store, "ses_f.c") == [7]
