"""What Sessile costs over sglang alone, and what moving KV between sglang replicas saves.

``overhead`` runs the same requests (the same prompts, token by token) in three ways, in turn and
in changing order: by sglang's ``Engine`` in this process; as turns of sessions, through a gateway
and a worker with the SDK, where the worker's sglang has the very same arguments (``storage=own``);
and as the second, with KV that can move (``storage=sessile``: sglang's HiCache and Sessile's page
pool). It compares time to the first token, time between tokens, and throughput. ``moves`` compares
the move of a session of 2,000 tokens to another replica with computing it there, and follows the
cached share of an agent's prompts before and after its replica is drained. Real processes on this
machine; prints JSON.

    OMP_NUM_THREADS=1 python -m loadtest.bench.sglang --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import anyio
from sessile import Sessile, Session, Tokens

from gateway.cli.launch import Cluster
from workers.engines.model_store import model_folder
from workers.engines.registry import create_backend
from workers.engines.sglang.config import SglangConfig
from workers.engines.sglang.native import server_arguments
from workers.engines.sglang.runtime import Runtime
from workers.engines.sglang_requests.generations import Chunk, Request
from workers.text.port import ChatMessage, LastTurn, Role, TextCodec

OPTIONS = {"max_total_tokens": "8192", "max_running": "8", "chunked_prefill_size": "512"}
HOST_PAGES = "600"
OUTPUT_TOKENS = 48
PROMPT_WORDS = 160
MOVED_TOKENS = 2000
AGENT_TURNS = 12
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SYSTEM = "Be brief."
NUMBERS = count()


@dataclass(slots=True)
class Measured:
    """Some requests at once: times of every token, and from first to last."""

    asked_s: list[float] = field(default_factory=list)
    tokens_s: list[list[float]] = field(default_factory=list)

    def report(self) -> dict[str, float]:
        first = [times[0] - asked for asked, times in zip(self.asked_s, self.tokens_s, strict=True)]
        gaps = [later - one for times in self.tokens_s for one, later in pairwise(times)]
        took = max(times[-1] for times in self.tokens_s) - min(self.asked_s)
        return {
            "ttft_ms": 1000 * statistics.median(first),
            "itl_ms": 1000 * statistics.mean(gaps),
            "tokens_per_s": sum(map(len, self.tokens_s)) / took,
        }


def prompt() -> str:
    """Words that no prompt before had at its beginning, so that no cache has them."""
    number = next(NUMBERS)
    return f"{number} is the number of this story. " + "the sea is calm and the night is long " * (
        PROMPT_WORDS // 9
    )


# -- sglang alone ---------------------------------------------------------------------------------


class Alone:
    """sglang's ``Engine`` in this process, as a worker would run it but for its page pool."""

    def __init__(self, folder: Path, codec: TextCodec) -> None:
        self._folder = folder
        self._codec = codec
        self._waiting: dict[str, tuple[list[float], anyio.Event]] = {}
        self._failure: Exception | None = None

    @asynccontextmanager
    async def running(self, scratch: Path) -> AsyncIterator[Alone]:
        config = SglangConfig.from_options({**OPTIONS, "storage": "own"})
        events, replay = (f"ipc://{scratch / name}" for name in ("events", "replay"))
        arguments = await anyio.to_thread.run_sync(
            server_arguments, config, self._folder, scratch / "none", events, replay
        )
        self._runtime = Runtime(
            arguments,
            events=events,
            replay=replay,
            on_chunk=self._take,
            on_events=lambda batch: None,
            on_end=self._fail,
        )
        await self._runtime.start()
        try:
            yield self
        finally:
            await self._runtime.aclose()

    async def measure(self, prompts: list[str]) -> Measured:
        """Every prompt as a request, all at once."""
        measured = Measured()

        async def one(text: str) -> None:
            messages = [ChatMessage(Role.SYSTEM, SYSTEM), ChatMessage(Role.USER, text)]
            ids = self._codec.render(LastTurn.NONE, messages, [])
            sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            rid = f"r{next(NUMBERS)}."
            times, ended = self._waiting[rid] = [], anyio.Event()
            measured.asked_s.append(time.perf_counter())
            measured.tokens_s.append(times)
            self._runtime.generate(Request(rid, ids, sampling, "salt", "", 0))
            await ended.wait()
            if self._failure is not None:
                raise self._failure

        async with anyio.create_task_group() as tasks:
            for text in prompts:
                tasks.start_soon(one, text)
        return measured

    def _take(self, chunk: Chunk) -> None:
        times, ended = self._waiting[chunk.rid]
        times += [time.perf_counter()] * len(chunk.tokens)
        if chunk.error is not None:
            self._failure = RuntimeError(chunk.error)
        if chunk.finish is not None or chunk.error is not None:
            ended.set()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for _, ended in self._waiting.values():
            ended.set()


# -- through Sessile ------------------------------------------------------------------------------


async def through_sessile(client: Sessile, prompts: list[str]) -> Measured:
    """The same prompts as turns of new sessions."""
    measured = Measured()
    sessions = [await client.open(system=SYSTEM) for _ in prompts]

    async def one(session: Session, text: str) -> None:
        times: list[float] = []
        measured.asked_s.append(time.perf_counter())
        measured.tokens_s.append(times)
        turn = session.run(
            text, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=300
        )
        async with aclosing(aiter(turn)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    times += [time.perf_counter()] * len(event.token_ids)

    async with anyio.create_task_group() as tasks:
        for session, text in zip(sessions, prompts, strict=True):
            tasks.start_soon(one, session, text)
    return measured


async def overhead(folder: Path, rounds: int) -> dict[str, Any]:
    """The three ways, at 1 and 8 requests at once: medians, and throughput against sglang alone."""
    codec = create_backend("torch", {"model": str(folder)}, time.monotonic).codec
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sessile-bench-")))
        alone = await stack.enter_async_context(Alone(folder, codec).running(scratch))
        ways: list[tuple[str, Callable[[list[str]], Awaitable[Measured]]]] = [
            ("alone", alone.measure)
        ]
        for storage in ("own", "sessile"):
            cluster = await stack.enter_async_context(_fleet(folder, storage, ["r1"]))
            client = await stack.enter_async_context(Sessile(cluster.targets))
            ways.append((f"storage={storage}", partial(through_sessile, client)))
        for number in range(rounds + 1):
            for width in (1, 8):
                prompts = [prompt() for _ in range(width)]
                for name, way in ways:
                    measured = await way(prompts)
                    if number:  # the first one warms up
                        found.setdefault((name, width), []).append(measured.report())
            ways.append(ways.pop(0))
    return {f"{name} x{width}": _medians(found, name, width) for name, width in sorted(found)}


def _medians(
    found: dict[tuple[str, int], list[dict[str, float]]], name: str, width: int
) -> dict[str, float]:
    reports, alone = found[name, width], found["alone", width]
    medians = {key: round(statistics.median(r[key] for r in reports), 2) for key in reports[0]}
    ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(alone, reports, strict=True)]
    return {**medians, "throughput_of_alone": round(statistics.median(ratios), 4)}


@asynccontextmanager
async def _fleet(folder: Path, storage: str, names: list[str]) -> AsyncIterator[Cluster]:
    options = {**OPTIONS, "model": str(folder), "storage": storage}
    if storage == "sessile":
        options["host_pages"] = HOST_PAGES
    async with Cluster(engine="sglang", engine_options=options, environment=ENVIRONMENT) as cluster:
        await cluster.start_gateway()
        for name in names:
            await cluster.start_worker(name)
            await cluster.wait_ready()
        yield cluster


# -- moves ----------------------------------------------------------------------------------------


async def moves(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """A session of about MOVED_TOKENS: a turn where its KV is, one after a move with it, and one of
    another session of the same text, computed."""
    words = "the keeper counts the ships and writes the weather in his book "
    moved_ms, copied, local_ms, after_ms, cold_ms, cached, context = [], [], [], [], [], [], []
    for _ in range(rounds):
        async with (
            Sessile(cluster.targets, tenant=f"t{next(NUMBERS)}") as client,
            Sessile(cluster.targets, tenant=f"t{next(NUMBERS)}") as another,
        ):
            session = await client.open(system=words * (MOVED_TOKENS // 12))
            await turn_of(session, "Go on.", 4)
            first_ms, _, length = await turn_of(session, "And then?", 4)
            local_ms.append(first_ms)
            context.append(length)
            owner = (await session.refresh()).owner
            assert owner is not None
            target = "r2" if owner.replica_id == "r1" else "r1"
            moved = await client.fleet.migrate(session.session_id, target=target)
            assert moved.moved, moved.detail
            moved_ms.append(moved.duration_ms)
            copied.append(moved.bytes_copied)
            first_ms, hit, _ = await turn_of(session, "And now?", 4)
            after_ms.append(first_ms)
            cached.append(hit)
            anew = await another.open(system=words * (MOVED_TOKENS // 12))
            cold_ms.append((await turn_of(anew, "Go on.", 4))[0])
            for one in (session, anew):  # a drain would have to move them all
                await one.close()
    both = [one + other for one, other in zip(moved_ms, after_ms, strict=True)]
    return {
        "context_tokens": statistics.median(context),
        "move_ms": round(statistics.median(moved_ms), 1),
        "copied_mb": round(statistics.median(copied) / 1e6, 1),
        "ttft_without_move_ms": round(statistics.median(local_ms), 1),
        "ttft_after_move_ms": round(statistics.median(after_ms), 1),
        "move_and_ttft_ms": round(statistics.median(both), 1),
        "cached_tokens_after_move": statistics.median(cached),
        "ttft_computed_ms": round(statistics.median(cold_ms), 1),
        "computed_over_moved": round(
            statistics.median(cold / move for cold, move in zip(cold_ms, both, strict=True)), 2
        ),
    }


async def agent(cluster: Cluster) -> dict[str, Any]:
    """The cached share of what an agent's prompts repeat; its replica is drained half-way."""
    shares: list[float] = []
    async with Sessile(cluster.targets, tenant=f"t{next(NUMBERS)}") as client:
        session = await client.open(system="You are a careful agent. " * 20)
        known = 0
        for number in range(AGENT_TURNS):
            if number == AGENT_TURNS // 2:
                owner = (await session.refresh()).owner
                assert owner is not None
                async with aclosing(client.fleet.drain(owner.replica_id, timeout_s=60)) as steps:
                    progress = [step async for step in steps]
                assert progress[-1].moved_without_kv == 0, progress
            _, cached, context = await turn_of(session, "Observation: " + "all is well " * 12, 24)
            if known:
                shares.append(cached / known)
            known = context
    half = AGENT_TURNS // 2 - 1
    return {
        "before_drain": round(statistics.mean(shares[:half]), 4),
        "first_turn_after_drain": round(shares[half], 4),
        "after_drain": round(statistics.mean(shares[half:]), 4),
    }


async def turn_of(session: Session, text: str, max_tokens: int) -> tuple[float, int, int]:
    """A greedy turn: ms to its first token, cached tokens, and the context it leaves."""
    asked, first = time.perf_counter(), 0.0
    turn = session.run(text, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout_s=300)
    async with aclosing(aiter(turn)) as events:
        async for event in events:
            if isinstance(event, Tokens) and not first:
                first = time.perf_counter()
    result = await turn.result()
    usage = result.usage
    return (
        1000 * (first - asked),
        usage.cached_tokens,
        usage.input_tokens + usage.output_tokens,
    )


async def main(rounds: int, parts: list[str]) -> dict[str, Any]:
    """Everything that is asked for, each part on a fleet of its own."""
    os.environ.update(ENVIRONMENT)  # sglang's processes take them from here or from their worker
    folder = model_folder()
    report: dict[str, Any] = {}
    if "overhead" in parts:
        report["overhead"] = await overhead(folder, rounds)
    if "moves" in parts:
        async with _fleet(folder, "sessile", ["r1", "r2"]) as cluster:
            report["moves"] = await moves(cluster, rounds)
            report["agent"] = await agent(cluster)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["overhead", "moves"])
    options = parser.parse_args()
    report = anyio.run(main, options.rounds, options.parts)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
