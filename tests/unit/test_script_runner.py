"""Repeats of calls without an answer, in the caller's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from statestore.executor import Reply, ScriptCall
from statestore.ports import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable
from statestore.records import NewSession
from statestore.redis_store import RedisStore
from statestore.script_runner import RetryPolicy, ScriptRunner, script_call

pytestmark = pytest.mark.anyio

DOWN = StoreUnavailable("down")
CALLS = [script_call("read_session", [f"k{i}"], []) for i in range(3)]


class FakeServer:
    """Answers each pipeline as scripted (by key, then ``b"ok"``), and keeps the time."""

    def __init__(
        self, *rounds: Mapping[str, Reply | StoreError], attempt_takes_s: float = 0
    ) -> None:
        self.rounds = list(rounds)
        self.attempt_takes_s = attempt_takes_s
        self.now = 0.0
        self.sent: list[list[str]] = []
        self.limits: list[float] = []

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        self.sent.append([call.keys[0] for call in calls])
        self.limits.append(timeout_s)
        self.now += self.attempt_takes_s
        answers = self.rounds.pop(0) if self.rounds else {}
        return [answers.get(call.keys[0], b"ok") for call in calls]

    async def aclose(self) -> None: ...

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def runner(self, policy: RetryPolicy | None = None) -> ScriptRunner:
        return ScriptRunner(self, policy or RetryPolicy(), lambda: self.now, self.sleep)


async def test_only_calls_without_an_answer_are_repeated() -> None:
    server = FakeServer({"k1": DOWN}, {"k1": DOWN}, {"k1": b"late"})
    assert await server.runner().run(*CALLS) == [b"ok", b"late", b"ok"]
    assert server.sent == [["k0", "k1", "k2"], ["k1"], ["k1"]]


async def test_a_process_stopped_past_its_time_limit_asks_no_more() -> None:
    server = FakeServer({"k0": DOWN})

    async def stopped(seconds: float) -> None:
        server.now += 60 + seconds

    runner = ScriptRunner(server, RetryPolicy(), lambda: server.now, stopped)
    with pytest.raises(StoreUnavailable, match="down"):
        await runner.run(*CALLS)
    assert len(server.sent) == 1


async def test_delays_grow_to_a_bound_and_the_total_is_limited() -> None:
    server = FakeServer(*[{"k0": DOWN}] * 100)
    policy = RetryPolicy(total_timeout_s=1.0, first_delay_s=0.1, max_delay_s=0.3)
    with pytest.raises(StoreUnavailable, match="down"):
        await server.runner(policy).run(CALLS[0])
    # At 0, 0.1, 0.3, 0.6 and 0.9 s.
    assert len(server.sent) == 5
    assert server.now <= 1.0


async def test_an_attempt_never_outlasts_the_total() -> None:
    server = FakeServer(*[{"k0": DOWN}] * 100, attempt_takes_s=0.4)
    policy = RetryPolicy(attempt_timeout_s=0.5, total_timeout_s=1.0, first_delay_s=0.1)
    with pytest.raises(StoreUnavailable):
        await server.runner(policy).run(CALLS[0])
    assert server.limits == [0.5, pytest.approx(0.5)]


async def test_other_failures_are_not_repeated() -> None:
    server = FakeServer({"k0": StoreMisconfigured("no permission")})
    with pytest.raises(StoreMisconfigured, match="no permission"):
        await server.runner().run(*CALLS)
    assert len(server.sent) == 1


async def test_an_answer_that_no_script_gives_is_reported_as_corruption() -> None:
    server = FakeServer()
    store = RedisStore(server)
    with pytest.raises(StoreCorrupt, match="unexpected answer"):
        await store.open_session(NewSession("ses_f", "t", "m", b"", b""))


async def test_a_record_of_a_newer_schema_is_refused_not_guessed_at() -> None:
    key = "sessile:{f}:s:ses_f"
    store = RedisStore(FakeServer({key: [b"schema", b"9"]}))
    with pytest.raises(StoreCorrupt, match="schema 9: upgrade"):
        await store.get_session("ses_f")
