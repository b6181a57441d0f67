"""Group commit: batches, order, retries, and whom a failure concerns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import anyio
import pytest

from statestore.ports import (
    Append,
    Appended,
    AppendOutcome,
    Fenced,
    JournalPort,
    StoreCorrupt,
    StoreError,
    StoreUnavailable,
)
from statestore.records import NO_EPOCH, Epoch, Position
from tests.support.replica_world import in_virtual_time
from workers.journal import Journal, until_answered

LATENCY_S = 0.01


@dataclass
class FakeStore:
    """Answers every append after LATENCY_S, as ``answer`` says."""

    answer: Callable[[Append], AppendOutcome | StoreError] = lambda append: Appended(append.head)
    batches: list[list[Append]] = field(default_factory=list)
    flying: int = 0
    most_flying: int = 0

    async def append_many(self, appends: Sequence[Append]) -> list[AppendOutcome | StoreError]:
        self.batches.append(list(appends))
        self.flying += 1
        self.most_flying = max(self.most_flying, self.flying)
        await anyio.sleep(LATENCY_S)
        self.flying -= 1
        return [self.answer(append) for append in appends]


def append(session: str, length: int = 1) -> Append:
    head = Position(length, b"d")
    return Append(session, Epoch(1, b"n"), "t", Position(length - 1, b"c"), [7], head)


def journal(store: FakeStore, lanes: int = 1) -> Journal:
    return Journal(cast(JournalPort, store), lanes=lanes)


async def started(tasks: anyio.abc.TaskGroup, store: FakeStore, lanes: int = 1) -> Journal:
    built = journal(store, lanes)
    await tasks.start(built.run)
    return built


@in_virtual_time
async def test_what_is_asked_for_while_a_pipeline_flies_is_the_next_one() -> None:
    store = FakeStore()
    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store)
        async with anyio.create_task_group() as turns:
            turns.start_soon(j.append, append("a"), 10.0)
            await anyio.sleep(LATENCY_S / 2)
            for name in "bcd":
                turns.start_soon(j.append, append(name), 10.0)
        batches = [sorted(a.session_id for a in batch) for batch in store.batches]
        assert batches == [["a"], ["b", "c", "d"]]
        assert store.most_flying == 1
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_lanes_do_not_wait_for_each_other() -> None:
    store = FakeStore()
    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store, lanes=8)
        async with anyio.create_task_group() as turns:
            for number in range(16):
                turns.start_soon(j.append, append(f"ses_{number}"), 10.0)
        assert store.most_flying > 1
        assert anyio.current_time() == pytest.approx(LATENCY_S)
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_forks_of_one_family_share_a_lane() -> None:
    store = FakeStore()
    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store, lanes=8)
        async with anyio.create_task_group() as turns:
            for number in range(8):
                turns.start_soon(j.append, append(f"ses_family.{number}"), 10.0)
        assert store.most_flying == 1
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_unanswered_appends_are_repeated_unchanged_while_others_are_released() -> None:
    def answer(asked: Append) -> AppendOutcome | StoreError:
        down = asked.session_id == "a" and anyio.current_time() < 1
        return StoreUnavailable("no answer") if down else Appended(asked.head)

    store = FakeStore(answer)
    done: dict[str, float] = {}

    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store)

        async def turn(name: str) -> None:
            assert await j.append(append(name), 10.0) == Appended(Position(1, b"d"))
            done[name] = anyio.current_time()

        async with anyio.create_task_group() as turns:
            turns.start_soon(turn, "a")
            turns.start_soon(turn, "b")
        assert done["b"] == pytest.approx(LATENCY_S)
        assert 1 < done["a"] < 1.7
        repeats = [a for batch in store.batches for a in batch if a.session_id == "a"]
        assert len(repeats) < 15  # it backs off
        assert all(a is repeats[0] for a in repeats)
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_past_its_time_an_append_fails_as_unavailable() -> None:
    store = FakeStore(lambda asked: StoreUnavailable("no answer"))
    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store)
        with pytest.raises(StoreUnavailable):
            await j.append(append("a"), 2.0)
        assert 2 <= anyio.current_time() < 3
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_refusals_are_outcomes_and_failures_are_raised_at_once() -> None:
    async with anyio.create_task_group() as tasks:
        fenced = Fenced(NO_EPOCH, None)
        j = await started(tasks, FakeStore(lambda asked: fenced))
        assert await j.append(append("a"), 1.0) == fenced
        j = await started(tasks, FakeStore(lambda asked: StoreCorrupt("newer schema")))
        with pytest.raises(StoreCorrupt):
            await j.append(append("a"), 1.0)
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_a_second_commit_of_a_session_is_a_bug_and_a_cancelled_one_makes_room() -> None:
    store = FakeStore(lambda asked: StoreUnavailable("no answer"))
    async with anyio.create_task_group() as tasks:
        j = await started(tasks, store)
        async with anyio.create_task_group() as turns:
            turns.start_soon(j.append, append("a"), 100.0)
            await anyio.sleep(1)
            with pytest.raises(AssertionError):
                await j.append(append("a", 2), 100.0)
            turns.cancel_scope.cancel()
        sent = len(store.batches)
        store.answer = lambda asked: Appended(asked.head)
        await j.append(append("a", 2), 100.0)
        assert all(a.head.length == 2 for batch in store.batches[sent:] for a in batch)
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_calls_are_repeated_until_answered_or_out_of_time() -> None:
    calls = 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        if anyio.current_time() < 3:
            raise StoreUnavailable("no answer")
        return "answer"

    assert await until_answered(call, 10.0) == "answer"
    assert calls < 20
    with pytest.raises(StoreUnavailable):
        await until_answered(lambda: _never(), anyio.current_time() + 1)


async def _never() -> None:
    raise StoreUnavailable("no answer")
