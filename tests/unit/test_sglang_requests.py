"""How generations become requests to sglang, and what comes back becomes steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from workers.engines.port import (
    EngineFinish,
    EngineInfo,
    EngineOverloaded,
    GenerateRequest,
    Sampling,
    StepOutput,
)
from workers.engines.sglang_requests.generations import PARKED_TOKENS, Chunk, Generations, Request

pytestmark = pytest.mark.anyio

EOS = 2
INFO = EngineInfo(
    engine="sglang",
    model="m",
    vocab_size=100,
    max_context_tokens=40,
    page_size=4,
    capacity_pages=8,
    page_bytes=1,
    kv_fingerprint=b"f",
    max_running=2,
    max_queued=1,
    eos_token_ids=(EOS,),
)


class Pages:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)


class World:
    """Generations whose sglang is the test."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.aborted: list[str] = []
        self.steps: list[list[StepOutput]] = []
        self.pages: list[Pages] = []
        self.it = Generations(self, INFO, self._pages)
        self.it.on_step = lambda outputs: self.steps.append([*outputs])

    def generate(self, request: Request) -> None:
        self.asked.append(request)

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    def _pages(self, namespace: bytes, tokens: Sequence[int]) -> Pages:
        self.pages.append(Pages())
        self.pages[-1].extend(tokens)
        return self.pages[-1]

    def submit(self, name: str = "g", tokens: Sequence[int] = (5, 6), **fields: Any) -> None:
        defaults: dict[str, Any] = {
            "namespace": b"n",
            "max_new_tokens": 10,
            "sampling": Sampling(),
        }
        self.it.submit(GenerateRequest(generation_id=name, tokens=tokens, **{**defaults, **fields}))

    def say(self, *tokens: int, of: int = -1, finish: str | None = None, error: str = "") -> None:
        """sglang answers to a request (the last one)."""
        self.it.take(Chunk(self.asked[of].rid, tokens, 4, 0.5, finish, error or None))

    async def heard(self) -> list[StepOutput]:
        """Everything delivered so far."""
        await asyncio.sleep(0)
        return [output for step in self.steps for output in step]


def name_of(request: Request) -> str:
    return request.rid.partition("/")[2].partition("#")[0]


@pytest.fixture
async def world() -> World:
    return World()


async def test_a_generation_is_asked_for_as_it_is(world: World) -> None:
    world.submit(
        sampling=Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=1 << 63 | 3),
        stop_token_ids=frozenset({EOS, 9}),
        retention_id="s",
        priority=2,
        trace={"traceparent": "00-…"},
    )
    (request,) = world.asked
    assert request.input_ids == [5, 6]
    assert request.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "sampling_seed": 3,
        "max_new_tokens": 10,
        "stop_token_ids": [EOS, 9],
    }
    assert (request.session_id, request.priority, request.salt) == ("s", 2, b"n".hex())
    assert request.trace == {"traceparent": "00-…"}


async def test_a_place_goes_to_the_tenant_that_has_had_least(world: World) -> None:
    world.it.info = replace(INFO, max_running=1, max_queued=9)
    for name in ("a1", "a2", "a3"):
        world.submit(name, namespace=b"a")
    world.say(7)
    world.submit("b1", namespace=b"b")
    for finished in ("a1", "b1", "a2"):
        assert name_of(world.asked[-1]) == finished
        world.say(8, EOS, 7, 7)
        world.it.cancel(finished)
    assert name_of(world.asked[-1]) == "a3"


async def test_chunks_of_one_turn_of_the_loop_are_one_step(world: World) -> None:
    world.submit("a")
    world.submit("b")
    world.say(7, of=0)
    world.say(8, of=1)
    world.say(9, of=1)
    await asyncio.sleep(0)
    assert world.steps == [
        [StepOutput("a", (7,), None, 4), StepOutput("b", (8, 9), None, 4)],
    ]
    assert [pages.tokens for pages in world.pages] == [[5, 6, 7], [5, 6, 8, 9]]


@pytest.mark.parametrize("stops", [frozenset({EOS, 9}), frozenset({9})])
async def test_a_stop_token_ends_it_and_nothing_after_it_is_delivered(
    world: World, stops: frozenset[int]
) -> None:
    world.submit(stop_token_ids=stops)
    assert world.asked[0].sampling.get("ignore_eos", False) == (EOS not in stops)
    world.say(7, 9, 8)
    world.say(8)
    assert await world.heard() == [StepOutput("g", (7, 9), EngineFinish.STOP_TOKEN, 4)]
    assert world.aborted == [world.asked[0].rid]
    assert world.it.running == 0


async def test_the_limit_of_the_context_ends_it(world: World) -> None:
    world.submit(tokens=[1] * 38)
    assert world.asked[0].sampling["max_new_tokens"] == 2
    world.say(7, 8, finish="length")
    assert await world.heard() == [StepOutput("g", (7, 8), EngineFinish.MAX_TOKENS, 4)]
    assert world.aborted == []


async def test_stops_are_forbidden_before_the_minimum_and_watched_after_it(world: World) -> None:
    world.submit(stop_token_ids=frozenset({EOS}), min_new_tokens=3)
    first = world.asked[0].sampling
    assert (first["max_new_tokens"], set(first["logit_bias"])) == (3, {str(EOS)})
    world.say(7, 8, 9, finish="length")
    second = world.asked[1]
    assert second.input_ids == [5, 6, 7, 8, 9]
    assert second.sampling["max_new_tokens"] == 7
    assert "logit_bias" not in second.sampling
    world.say(EOS, finish="stop")
    assert await world.heard() == [StepOutput("g", (7, 8, 9, EOS), EngineFinish.STOP_TOKEN, 4)]


async def test_what_is_parked_delivers_nothing_until_it_goes_on(world: World) -> None:
    world.submit()
    world.it.park("g")
    world.say(7)
    world.say(8)
    assert await world.heard() == []
    world.it.unpark("g")
    assert await world.heard() == [StepOutput("g", (7, 8), None, 4)]


async def test_what_ended_while_it_was_parked_ends_when_it_goes_on(world: World) -> None:
    world.submit()
    world.it.park("g")
    world.say(7, finish="abort", error="no room")
    assert world.it.running == 1
    world.it.unpark("g")
    assert [output.error for output in await world.heard()] == ["no room"]
    assert world.it.running == 0


async def test_a_parked_generation_is_taken_back_once_it_has_run_far_ahead() -> None:
    world = World()
    world.it.info = INFO.__class__(
        **{**{f: getattr(INFO, f) for f in INFO.__slots__}, "max_context_tokens": 10_000}
    )
    world.submit(max_new_tokens=9_000)
    world.it.park("g")
    for _ in range(PARKED_TOKENS + 1):
        world.say(7)
    assert world.aborted == [world.asked[0].rid]
    world.it.unpark("g")
    assert world.asked[1].input_ids == [5, 6] + [7] * (PARKED_TOKENS + 1)
    assert len((await world.heard())[0].tokens) == PARKED_TOKENS + 1


async def test_nothing_is_delivered_of_what_was_cancelled(world: World) -> None:
    world.submit()
    world.say(7)
    world.it.cancel("g")
    world.say(8)
    assert await world.heard() == []
    assert world.aborted == [world.asked[0].rid]
    world.it.cancel("g")


async def test_places_are_given_by_priority_then_in_order(world: World) -> None:
    world.submit("a")
    world.submit("b")
    world.submit("low")
    with pytest.raises(EngineOverloaded):
        world.submit("one more")
    world.it.cancel("low")
    world.submit("low")
    assert [name_of(r) for r in world.asked] == ["a", "b"]
    assert (world.it.running, world.it.queued, world.it.prefill_tokens) == (2, 1, 6)
    world.say(7, of=0, finish="length")
    world.it.cancel("a")
    assert name_of(world.asked[-1]) == "low"


async def test_an_error_ends_one_generation_alone(world: World) -> None:
    world.submit("a")
    world.submit("b")
    world.say(of=0, error="it never fits")
    outputs = await world.heard()
    assert outputs == [StepOutput("a", (), None, 4, "it never fits")]
    assert world.it.running == 1


@pytest.mark.parametrize("tokens", [[], [100], [-1], [1] * 40])
async def test_bad_requests_are_refused(world: World, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="token"):
        world.submit(tokens=tokens)
    assert world.asked == []


async def test_after_a_failure_nothing_is_taken(world: World) -> None:
    world.submit()
    world.it.on_step = None
    world.say(7)
    assert await world.heard() == []
    with pytest.raises(Exception, match="not running"):
        world.submit("b")


async def test_no_request_id_begins_as_another_does(world: World) -> None:
    """sglang aborts every request whose id begins with the one that it is given."""
    other = World()
    for number in range(12):
        for asked in (world, other):
            asked.submit(f"g{number}")
            asked.it.cancel(f"g{number}")
    rids = [request.rid for request in [*world.asked, *other.asked]]
    assert [(a, b) for a in rids for b in rids if a is not b and b.startswith(a)] == []


async def test_of_every_request_the_first_chunk_is_its_prefill(world: World) -> None:
    world.submit(tokens=[5] * 10, stop_token_ids=frozenset({EOS}), min_new_tokens=2)
    world.say(7)  # 6 computed in half a second
    world.say(8, finish="length")
    assert (world.it.rates.prefill, world.it.rates.decode) == (12.0, 2.0)
    world.say(9)  # 8 computed, of its second request
    assert world.it.rates.decode == 2.0
    assert world.it.rates.prefill > 12.0
