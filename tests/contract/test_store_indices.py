"""Indices outside the family slots: written before the records, set right when they are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from statestore import keys
from statestore.executor import Reply, ScriptCall, ScriptExecutor
from statestore.ports import Appended, SessionWritten, StoreError, StoreUnavailable, TurnEnded
from statestore.records import StoreLimits
from statestore.redis_store import MAX_PAGE_BYTES, SESSIONS_PER_READ, RedisStore
from statestore.script_runner import RetryPolicy, script_call
from tests.support.owners import EMPTY, TENANT, A, B, Owner, new_session, opened
from tests.support.stores import ANSWERING, Backend, raw, store_on

pytestmark = pytest.mark.anyio


async def run(backend: Backend, script: str, *args: str | int) -> Reply:
    call = script_call(script, [keys.DUE], list(args))
    (reply,) = await backend.executor.execute([call], 5)
    assert not isinstance(reply, Exception)
    return reply


@ANSWERING
async def test_the_earliest_time_at_which_a_session_is_due_stands(backend: Backend) -> None:
    store = store_on(backend, StoreLimits(index_grace_ms=0))
    owner = await Owner.of(store)
    await owner.begin(timeout_ms=20)
    await owner.begin("t2")  # refused, but noted as due in a minute
    expired: list[tuple[str, str]] = []
    while not expired:
        expired += (await store.sweep(10)).turns_expired
    assert expired == [("ses_f", "t1")]


@ANSWERING
async def test_a_session_noted_during_a_sweep_is_looked_at_again(backend: Backend) -> None:
    await run(backend, "due", "ses_f", 0, 0)
    listed = await run(backend, "due_list", 10)
    assert isinstance(listed, list)
    session_id, score = (str(item, "ascii") for item in listed if isinstance(item, bytes))
    assert session_id == "ses_f"
    # The sweep finds nothing to do; meanwhile a turn begins.
    await run(backend, "due", "ses_f", 60_000, 0)
    await run(backend, "due_fix", "ses_f", score, "")
    again: Reply = []
    while not again:
        again = await run(backend, "due_list", 10)
    assert isinstance(again, list)
    assert again[0] == b"ses_f"
    await run(backend, "due_fix", "ses_f", str(again[1], "ascii"), "")  # type: ignore[arg-type]
    assert "sessile:due" not in await backend.keys()


@ANSWERING
async def test_a_note_repeated_during_a_sweep_is_not_taken_for_the_one_listed(
    backend: Backend,
) -> None:
    """The answer to the first was lost. Nobody would look at the session again."""
    for _ in range(50):
        await run(backend, "due", "ses_f", 0, 0)
        listed = await raw(backend, keys.DUE, "ZSCORE", "ses_f")
        await run(backend, "due", "ses_f", 0, 0)
        await run(backend, "due", "ses_f", 0, 0)
        assert await raw(backend, keys.DUE, "ZSCORE", "ses_f") != listed
        await raw(backend, keys.DUE, "ZREM", "ses_f")


class BetweenCalls:
    """An executor of one call at a time; ``meanwhile`` is awaited before each but the first of a
    pipeline, as other clients of a server may come between."""

    def __init__(self, inner: ScriptExecutor, meanwhile: Callable[[ScriptCall], Awaitable[object]]):
        self._inner, self._meanwhile = inner, meanwhile

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        replies: list[Reply | StoreError] = []
        for call in calls:
            if replies:
                await self._meanwhile(call)
            replies += await self._inner.execute([call], timeout_s)
        return replies

    async def aclose(self) -> None:
        await self._inner.aclose()


@ANSWERING
@pytest.mark.parametrize("write", ["close", "begin"])
async def test_a_sweep_between_a_note_and_its_write_does_not_forget_the_session(
    backend: Backend, write: str
) -> None:
    """An earlier note about the session comes due just then."""
    store = store_on(backend)
    owner = await Owner.of(store)

    async def sweep_meanwhile(call: ScriptCall) -> None:
        await run(backend, "due", "ses_other", 5, 0)
        while await raw(backend, keys.DUE, "ZSCORE", "ses_other"):
            await store.sweep(10)

    owner.store = RedisStore(BetweenCalls(backend.executor, sweep_meanwhile))
    await run(backend, "due", "ses_f", 2, 0)
    if write == "close":
        await owner.store.close("ses_f", 60_000)
    else:
        await owner.begun()
    assert await raw(backend, keys.DUE, "ZSCORE", "ses_f")


@ANSWERING
async def test_a_sweep_in_the_midst_of_a_repair_does_not_forget_the_session(
    backend: Backend,
) -> None:
    store = store_on(backend)
    owner = await Owner.of(store)
    saved = await backend.save()
    turn = await owner.begun()
    await backend.roll_back(saved)
    await raw(backend, keys.DUE, "DEL")

    async def sweep_meanwhile(call: ScriptCall) -> None:
        await store.sweep(10)

    interrupted = RedisStore(BetweenCalls(backend.executor, sweep_meanwhile))
    repair = owner.repair(EMPTY, owner.epoch, keep=0, turns=[turn], active="t1")
    assert await interrupted.repair(repair) == Appended(owner.head)
    assert await raw(backend, keys.DUE, "ZSCORE", "ses_f")


@ANSWERING
async def test_a_server_that_loses_writes_in_mid_sweep_keeps_what_is_due(backend: Backend) -> None:
    """The sweep saw a turn that had ended; then the server fails over to where it runs."""
    store = store_on(backend)
    owner = await Owner.of(store)
    await owner.begin(timeout_ms=0)
    saved = await backend.save()
    assert (await store.sweep(10)).turns_expired
    await backend.roll_back(saved)
    assert isinstance(await store.cancel_turn("ses_f", "t1"), TurnEnded)

    failing = FailsOver(backend, saved)
    assert (await RedisStore(failing, retry=RetryPolicy(first_delay_s=0)).sweep(10)).examined == 1
    assert failing.over
    assert (await store.sweep(10)).turns_expired == (("ses_f", "t1"),)


class FailsOver:
    """An executor whose server fails over, once, when it is to file a swept session."""

    def __init__(self, backend: Backend, saved: Any) -> None:
        self._backend, self._saved = backend, saved
        self.over = False

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        if not self.over and any(call.script.name == "due_fix" for call in calls):
            self.over = True
            await self._backend.roll_back(self._saved)
            return [StoreUnavailable("failed over") for _ in calls]
        return await self._backend.executor.execute(calls, timeout_s)

    async def aclose(self) -> None:
        await self._backend.executor.aclose()


async def test_an_entry_whose_record_is_still_to_come_is_not_dropped(backend: Backend) -> None:
    """Between its two writes an opening looks like an entry without a record."""
    await opened(store_on(backend))
    index = keys.tenant_index_key(TENANT)
    await _keep_only(backend, index)
    patient = store_on(backend, StoreLimits(index_grace_ms=60_000))
    assert (await patient.list_sessions(TENANT, "", 10)).sessions == ()
    assert index in await backend.keys()
    hasty = store_on(backend, StoreLimits(index_grace_ms=0))
    assert (await hasty.list_sessions(TENANT, "", 10)).sessions == ()
    assert index not in await backend.keys()


async def test_a_page_of_large_sessions_is_short(store: RedisStore) -> None:
    preamble = b"x" * (MAX_PAGE_BYTES // SESSIONS_PER_READ + 1)
    ids = [f"ses_{number}" for number in range(SESSIONS_PER_READ + 2)]
    for session_id in ids:
        await store.open_session(replace(new_session(session_id), preamble=preamble))
    page = await store.list_sessions(TENANT, "", 1000)
    rest = await store.list_sessions(TENANT, page.next_cursor, 1000)
    assert (len(page.sessions), len(rest.sessions)) == (SESSIONS_PER_READ, 2)
    assert rest.next_cursor == ""
    assert {session.session_id for session in page.sessions + rest.sessions} == set(ids)


async def test_a_session_that_comes_back_soon_stays_in_the_list_of_its_replica(
    store: RedisStore,
) -> None:
    owner = await Owner.of(store)
    epoch = owner.epoch
    for ref, nonce in ((B, b"away"), (A, b"back")):
        outcome = await store.take("ses_f", epoch, ref, nonce)
        assert isinstance(outcome, SessionWritten)
        epoch = outcome.session.epoch
    assert await store.sessions_of(A, 10) == ("ses_f",)
    assert await store.sessions_of(B, 10) == ()


async def test_a_damaged_session_does_not_hide_the_others(backend: Backend) -> None:
    store = store_on(backend)
    for session_id in ("ses_f", "ses_g"):
        await Owner.of(store, session_id)
    await raw(backend, keys.session_key("ses_g"), "HSET", "state", "?")
    assert await store.sessions_of(A, 10) == ("ses_f",)
    page = await store.list_sessions(TENANT, "", 10)
    assert [session.session_id for session in page.sessions] == ["ses_f"]


async def _keep_only(backend: Backend, key: str) -> None:
    saved = await backend.save()
    if isinstance(saved, dict):
        await backend.roll_back({k: v for k, v in saved.items() if k == key.encode()})
    else:
        await backend.roll_back([(k, v) for k, v in saved if k == key.encode()])


async def test_the_newest_session_is_first_though_the_clock_stepped_back(backend: Backend) -> None:
    store = store_on(backend)
    await opened(store, "ses_f")
    index = keys.tenant_index_key(TENANT)
    await raw(backend, index, "ZADD", 1 << 52, "ses_f")
    await opened(store, "ses_g")
    page = await store.list_sessions(TENANT, "", 10)
    assert [session.session_id for session in page.sessions] == ["ses_g", "ses_f"]


@ANSWERING
async def test_a_later_note_leaves_the_time_at_which_a_session_is_due(backend: Backend) -> None:
    await run(backend, "due", "ses_f", 60_000, 0)
    noted = await raw(backend, keys.DUE, "ZSCORE", "ses_f")
    await run(backend, "due", "ses_f", 90_000, 0)
    assert await raw(backend, keys.DUE, "ZSCORE", "ses_f") == noted
    await run(backend, "due", "ses_f", 30_000, 0)
    assert int(await raw(backend, keys.DUE, "ZSCORE", "ses_f")) < int(noted)  # type: ignore[arg-type]
