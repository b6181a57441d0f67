"""Limits and retries by client and by call, and redirected turns; no test waits for real."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from sessile import (
    InvalidRequest,
    Priority,
    RetryPolicy,
    Runtime,
    Sessile,
    TurnStatus,
    Unavailable,
    sync,
)
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.fake_gateway import (
    Cut,
    FakeGateway,
    accepted,
    finished,
    gateway_in_a_thread,
    serving,
    session,
    tokens,
)

pytestmark = pytest.mark.anyio

REDIRECT = pb.TurnEvent(redirect=pb.TurnRedirect(endpoint="127.0.0.1:1"))
ONE_TRY = RetryPolicy(max_attempts=1)


class Longest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


class Naps:
    """A clock that only moves while somebody sleeps, which takes no time."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def now(self) -> float:
        return sum(self.taken)

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
async def client(gateway: FakeGateway, naps: Naps) -> AsyncIterator[Sessile]:
    runtime = Runtime(now=naps.now, sleep=naps, rng=Longest())
    async with Sessile(gateway.target, runtime=runtime) as opened:
        yield opened


async def test_waits_double_up_to_their_ceiling_and_end_after_the_last_try(
    gateway: FakeGateway, client: Sessile, naps: Naps
) -> None:
    gateway.answers += [Cut()] * 10
    with pytest.raises(Unavailable):
        await client.session("ses_a").refresh()
    assert naps.taken == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


async def test_a_call_may_have_a_policy_of_its_own(
    gateway: FakeGateway, client: Sessile, naps: Naps
) -> None:
    gateway.answers += [Cut()] * 2
    handle = client.session("ses_a")
    with pytest.raises(Unavailable):
        await handle.with_options(retry=ONE_TRY).refresh()
    with pytest.raises(Unavailable):
        await client.with_options(retry=ONE_TRY).open()
    assert naps.taken == []
    gateway.answers += [Cut(), session_pb2.GetSessionResponse(session=session())]
    await handle.refresh()
    assert naps.taken == [0.05]


async def test_no_wait_goes_beyond_the_time_of_the_call(
    gateway: FakeGateway, client: Sessile, naps: Naps
) -> None:
    gateway.answers += [Cut()] * 10
    with pytest.raises(Unavailable):
        await client.session("ses_a").with_options(timeout_s=3.0).refresh()
    assert naps.taken == [0.05, 0.1, 0.2, 0.4, 0.8]  # 1.6 more would be past the end


async def test_what_a_handle_with_options_learns_the_other_knows(
    gateway: FakeGateway, client: Sessile
) -> None:
    gateway.answers.append(session_pb2.GetSessionResponse(session=session(turn_index=3)))
    handle = client.session("ses_a")
    await handle.with_options(timeout_s=5.0).refresh()
    assert handle.info is not None
    assert handle.info.turn_index == 3


@pytest.mark.parametrize("values", [(0, 0.1, 1.0), (3, -0.1, 1.0), (3, 0.1, -1.0)])
def test_a_policy_that_cannot_work_is_refused(values: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RetryPolicy(*values)


def test_the_sync_face_has_options_too() -> None:
    with gateway_in_a_thread() as gateway, sync.Sessile(gateway.target) as client:
        gateway.answers += [Cut()] * 2
        with pytest.raises(Unavailable):
            client.with_options(retry=ONE_TRY).open()
        with pytest.raises(Unavailable):
            client.session("ses_a").with_options(retry=ONE_TRY).refresh()


async def test_a_redirected_turn_is_asked_for_again_and_goes_on_where_it_was(
    gateway: FakeGateway, client: Sessile
) -> None:
    gateway.turns += [
        [accepted(), tokens(0), REDIRECT],
        [REDIRECT],
        [accepted("r2", attempt=2), tokens(2), finished(4)],
    ]
    result = await client.session("ses_a").run("Go.", turn_id="t1").result()
    assert (result.status, result.text, result.moves) == (TurnStatus.COMMITTED, "a b c d ", 1)
    first, *others = gateway.requests(pb.RunTurnRequest)
    assert not first.accepts_redirect
    assert [(r.attach_only, r.resume_from.length) for r in others] == [(True, 12), (True, 12)]


async def test_redirects_without_progress_have_an_end(
    gateway: FakeGateway, client: Sessile
) -> None:
    gateway.turns += [[accepted(), REDIRECT]] * 10
    with pytest.raises(Unavailable, match="redirected time and again"):
        await client.session("ses_a").run("Go.", turn_id="t1").result()


INTERACTIVE, BATCH = pb.TURN_PRIORITY_INTERACTIVE, pb.TURN_PRIORITY_BATCH


async def test_a_turn_has_its_own_priority_or_the_clients(gateway: FakeGateway) -> None:
    gateway.turns += [[accepted(), tokens(0), finished(2)]] * 5
    async with (
        Sessile(gateway.target) as usual,
        Sessile(gateway.target, priority=Priority.BATCH) as batch,
    ):
        await usual.session("ses_a").run("Go.").result()
        await usual.session("ses_a").run("Go.", priority=Priority.BATCH).result()
        await batch.session("ses_a").with_options(timeout_s=5).run("Go.").result()
        await batch.session("ses_a").run("Go.", priority=Priority.INTERACTIVE).result()
        await batch.session("ses_a").attach("t1").result()
    asked = [request.priority for request in gateway.requests(pb.RunTurnRequest)]
    assert asked == [INTERACTIVE, BATCH, BATCH, INTERACTIVE, BATCH]


async def test_a_turn_that_is_taken_up_again_has_its_priority(
    gateway: FakeGateway, client: Sessile
) -> None:
    gateway.turns += [[accepted(), tokens(0), Cut()], [accepted(), tokens(2), finished(4)]]
    await client.session("ses_a").run("Go.", priority=Priority.BATCH).result()
    requests = gateway.requests(pb.RunTurnRequest)
    assert [(r.attach_only, r.priority) for r in requests] == [(False, BATCH), (True, BATCH)]


async def test_a_priority_that_does_not_exist_is_refused_before_anything_is_sent(
    gateway: FakeGateway, client: Sessile
) -> None:
    with pytest.raises(InvalidRequest, match="urgent"):
        client.session("ses_a").run("Go.", priority="urgent")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="urgent"):
        Sessile(gateway.target, priority="urgent")  # type: ignore[arg-type]
    assert gateway.seen == []


def test_the_sync_face_has_priorities_too() -> None:
    with (
        gateway_in_a_thread() as gateway,
        sync.Sessile(gateway.target, priority=Priority.BATCH) as client,
    ):
        gateway.turns += [[accepted(), tokens(0), finished(2)]] * 3
        session = client.session("ses_a")
        session.run("Go.").result()
        session.run("Go.", priority=Priority.INTERACTIVE).result()
        session.attach("t1", priority=Priority.INTERACTIVE).result()
        asked = [request.priority for request in gateway.requests(pb.RunTurnRequest)]
    assert asked == [BATCH, INTERACTIVE, INTERACTIVE]
