"""Interactive before batch, from the public client to the engine's queue and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
import pytest
from sessile import (
    Accepted,
    Overloaded,
    Priority,
    ReplicaState,
    RetryPolicy,
    Runtime,
    Sessile,
    Tokens,
    Turn,
    TurnStatus,
)

from gateway.config import GatewayConfig
from gateway.main import serve as serve_gateway
from tests.support.servers import running_server, valkey_binary
from workers.config import ReplicaSettings, TurnLimits, WorkerConfig
from workers.main import serve as serve_worker

pytestmark = pytest.mark.anyio

ENGINE = {"max_running": 1, "max_queued": 24, "eos_probability": 0, "step_ms": 10}
BATCH_QUEUE = 6
TURN_TOKENS = 8
PATIENCE_S = 60.0
ONE_TRY = RetryPolicy(max_attempts=1)


@pytest.fixture
async def address(anyio_backend: str) -> AsyncIterator[str]:
    """A gateway and one worker, which runs one turn at a time, in this process."""
    with running_server(valkey_binary()) as url:
        gateway = GatewayConfig(listen="127.0.0.1:0", redis_url=url)
        worker = WorkerConfig(
            redis_url=url,
            replica=ReplicaSettings("a", turn=TurnLimits(batch_share=0.25)),
            engine_options=tuple((name, str(value)) for name, value in ENGINE.items()),
        )
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            await tasks.start(lambda **it: serve_worker(worker, stop=stop, **it))
            yield await tasks.start(lambda **it: serve_gateway(gateway, stop=stop, **it))
            stop.set()


@dataclass
class Patience:
    """How a client waits before it tries again: until it is let go."""

    asked_s: list[float] = field(default_factory=list)
    refused: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        self.refused.set()
        await self.go.wait()


async def until(turn: Turn, kind: type[Accepted] | type[Tokens]) -> None:
    """Reads up to the first event of that kind."""
    async for event in turn:
        if isinstance(event, kind):
            return
    raise AssertionError(f"the turn ended without {kind.__name__}")


async def ready(client: Sessile) -> None:
    async with aclosing(client.fleet.watch()) as fleets:
        async for replicas in fleets:
            if any(replica.state is ReplicaState.READY for replica in replicas):
                return


async def filled(job: Sessile) -> tuple[dict[str, Turn], Overloaded]:
    """Turns that are accepted, by name, until one is refused; and how that was told."""
    turns: dict[str, Turn] = {}
    while True:
        turn = (await job.open()).run("Go.", max_tokens=TURN_TOKENS)
        try:
            await until(turn, Accepted)
        except Overloaded as error:
            return turns, error
        turns[f"batch {len(turns)}"] = turn


async def test_a_queue_full_of_batch_turns_takes_interactive_ones_and_runs_them_first(
    address: str,
) -> None:
    patience = Patience()
    waits = Runtime(sleep=patience)
    with anyio.fail_after(PATIENCE_S):
        async with (
            Sessile(address) as client,
            Sessile(address, retry=ONE_TRY, priority=Priority.BATCH) as job,
            Sessile(address, priority=Priority.BATCH) as first,
            Sessile(address, priority=Priority.BATCH, runtime=waits) as patient,
        ):
            await ready(client)
            began: list[str] = []
            """Names of turns, in the order in which they had their first tokens."""

            async def read(name: str, turn: Turn) -> None:
                async for event in turn:
                    if isinstance(event, Tokens) and name not in began:
                        began.append(name)
                assert (await turn.result()).status is TurnStatus.COMMITTED

            running = (await first.open()).run("Go.", max_tokens=20_000, ignore_eos=True)
            async with running, asyncio.TaskGroup() as late:
                await until(running, Tokens)
                batch, refused = await filled(job)
                assert 0 < len(batch) <= BATCH_QUEUE
                assert refused.retry_after_s
                late.create_task(
                    read("late", (await patient.open()).run("Go.", max_tokens=TURN_TOKENS))
                )
                await patience.refused.wait()
                interactive: dict[str, Turn] = {}
                for name in ("interactive 0", "interactive 1"):
                    turn = (await client.open()).run("Go.", max_tokens=TURN_TOKENS)
                    await until(turn, Accepted)
                    interactive[name] = turn
                async with asyncio.TaskGroup() as others:
                    for name, turn in {**batch, **interactive}.items():
                        others.create_task(read(name, turn))
                    await running.cancel()
                assert set(began[:2]) == set(interactive)
                assert set(began[2:]) == set(batch), "those who waited are served in the end"
                patience.go.set()
            assert began[-1] == "late"
            # Without a delay that the server asks for, a first wait is half a tenth of a second.
            assert patience.asked_s[0] >= 0.1
