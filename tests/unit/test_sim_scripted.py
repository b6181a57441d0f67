"""A model that says what it is told: once for each turn, the same again wherever it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import anyio
import pytest

from workers.engines.port import EngineFailed, GenerateRequest, Sampling, StepOutput
from workers.engines.sim import scripted
from workers.engines.sim.config import SimConfig, SimTiming
from workers.engines.sim.scripted import Script, ScriptedEngine
from workers.text.byte_vocabulary import ASSISTANT, BOS, END_OF_TURN, USER

pytestmark = pytest.mark.anyio

PROMPT = [BOS, USER, *b"hello", END_OF_TURN, ASSISTANT]


async def generated(script: Script, tokens: Sequence[int], seed: int = 1, least: int = 0) -> bytes:
    """What a new engine with this script says after ``tokens``, its end mark as a newline."""
    engine = ScriptedEngine(SimConfig(timing=SimTiming(step_ms=0.01)), anyio.current_time, script)
    said: list[int] = []
    done = asyncio.Event()

    def on_step(outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            said.extend(output.tokens)
            if output.finish is not None:
                done.set()

    def on_failure(error: EngineFailed) -> None:
        raise error

    await engine.start(on_step, on_failure)
    engine.submit(
        GenerateRequest(
            "g",
            tokens,
            b"n",
            Sampling(seed=seed),
            max_new_tokens=30,
            min_new_tokens=least,
            stop_token_ids=frozenset({END_OF_TURN}),
        )
    )
    with anyio.fail_after(10):
        await done.wait()
    await engine.aclose()
    return bytes(ord("\n") if token == END_OF_TURN else token for token in said)


async def test_each_turn_says_the_next_line_and_the_same_one_if_it_is_run_again() -> None:
    script = Script()
    script.add("one")
    script.add("two")
    assert await generated(script, PROMPT, seed=1) == b"one\n"
    assert await generated(script, PROMPT, seed=2) == b"two\n"
    assert await generated(script, PROMPT, seed=1) == b"one\n"
    assert script.waiting == ()


async def test_a_turn_goes_on_in_the_middle_of_its_line() -> None:
    script = Script()
    script.add("a long line")
    assert await generated(script, PROMPT) == b"a long line\n"
    assert await generated(script, [*PROMPT, *b"a lon"]) == b"g line\n"


async def test_without_a_line_it_speaks_as_the_sim_engine_does_and_keeps_to_that() -> None:
    script = Script()
    first = await generated(script, PROMPT)
    script.add("late")
    assert await generated(script, PROMPT) == first
    assert script.waiting == ("late",)


async def test_a_line_is_filled_up_to_the_least_that_must_be_said() -> None:
    script = Script()
    script.add("hi")
    assert await generated(script, PROMPT, least=5) == b"hi   \n"


def test_lines_and_what_was_said_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "MAX_LINES", 3)
    monkeypatch.setattr(scripted, "MAX_SAID", 2)
    script = Script()
    for line in ("a", "b", "c"):
        script.add(line)
    with pytest.raises(OverflowError, match="3 lines wait"):
        script.add("d")
    assert [script.line_for(PROMPT, seed) for seed in (1, 2, 3)] == [b"a", b"b", b"c"]
    assert script.line_for(PROMPT, 3) == b"c"
    assert script.line_for(PROMPT, 1) is None
