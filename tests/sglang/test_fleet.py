"""A fleet of real sglang replicas (and a torch one) serves one session after another's death, and
with the KV of another."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import anyio
import psutil
import pytest
from sessile import Moved, Sessile, Session, Tokens, TurnResult

from gateway.cli.launch import Child, Cluster
from tests.support.otlp import Receiver, receiver
from workers.engines.model_store import model_folder

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SGLANG = {
    "host_pages": "400",
    "max_total_tokens": "4096",
    "max_running": "4",
    "chunked_prefill_size": "256",
}
OWN = {
    "max_total_tokens": "4096",
    "max_running": "4",
    "chunked_prefill_size": "256",
    "storage": "own",
    "hicache_storage_backend": "file",
}
"""KV in a storage of sglang's own that replicas share, here a folder."""
OPTIONS = {"s": ("sglang", SGLANG), "o": ("sglang", OWN), "t": ("torch", {"threads": "1"})}
"""By the first letter of a replica's name: its engine and that one's options."""
STORY = "Tell a long story about a lighthouse keeper who learns to speak with whales. "
LONG = "The keeper counts the ships, lights the lamp and writes the weather in his book. " * 30
TENANTS = (f"tenant-{index}" for index in count())
"""Every test has a namespace of its own: nothing of another's is in any cache."""


@dataclass
class Fleet:
    """What a test uses; dead workers are started again by the next one that asks."""

    cluster: Cluster
    storage: Path
    """Where the replicas of OWN keep their KV."""
    traces: Receiver
    """Of all processes, and of the sglangs in the replicas of OWN."""

    async def replica(self, name: str) -> Child:
        for child in self.cluster.workers:
            if child.name == name and child.running:
                return child
        engine, options = OPTIONS[name[0]]
        if options is OWN:
            traces = {"otlp_traces_endpoint": self.traces.endpoint.removeprefix("http://")}
            options = {**options, "enable_trace": "true", **traces}
        child = await self.cluster.start_worker(name, engine=engine, engine_options=options)
        await self.cluster.wait_ready()
        return child

    def client(self) -> Sessile:
        return Sessile(self.cluster.targets[0], tenant=next(TENANTS))


@pytest.fixture(scope="module")
async def fleet(
    anyio_backend: object, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    logs, storage = (tmp_path_factory.mktemp(name) for name in ("logs", "kv"))
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(storage),
    }
    model_folder()  # converted once, before two processes want to
    with receiver() as traces:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = traces.endpoint
        async with Cluster(log_directory=logs, environment=environment) as cluster:
            await cluster.start_gateway()
            yield Fleet(cluster, storage, traces)
    for child in cluster.children:
        assert "Traceback" not in child.log.read_text(errors="replace"), child.log


async def on(client: Sessile, session: Session, replica: str) -> None:
    """The (idle) session is this replica's from now on."""
    owner = (await session.refresh()).owner
    if owner is None or owner.replica_id != replica:
        moved = await client.fleet.migrate(session.session_id, target=replica, allow_recompute=True)
        assert moved.moved, moved.detail


async def said(session: Session, text: str, max_tokens: int) -> TurnResult:
    """A greedy turn of exactly so many tokens."""
    turn = session.run(text, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout_s=240)
    return await turn.result()


@pytest.mark.parametrize(
    ("victim", "heir"),
    [pytest.param("s1", "s2", marks=pytest.mark.essential), ("s1", "t1"), ("t1", "s1")],
    ids=lambda name: name,
)
async def test_a_turn_survives_its_replica_and_says_the_same(
    fleet: Fleet, victim: str, heir: str
) -> None:
    for name in (victim, heir):
        await fleet.replica(name)
    async with fleet.client() as client:
        session = await client.open(system="Be brief.")
        first = await said(session, STORY, 24)
        expected = await client.open(system="Be brief.")
        await said(expected, STORY, 24)
        await on(client, expected, heir)
        undisturbed = await tokens_of(expected, "And then?", 48)

        await on(client, session, victim)
        for other in fleet.cluster.workers:
            if other.running and other.name not in (victim, heir):
                other.kill(signal.SIGSTOP)
        try:
            tokens: list[int] = []
            moved: list[Moved] = []
            turn = session.run(
                "And then?", max_tokens=48, temperature=0.0, ignore_eos=True, timeout_s=240
            )
            async with aclosing(aiter(turn)) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        tokens += event.token_ids
                        if len(tokens) >= 8 and not moved:
                            next(
                                child
                                for child in fleet.cluster.workers
                                if child.name == victim and child.running
                            ).kill(signal.SIGKILL)
                    elif isinstance(event, Moved):
                        moved.append(event)
        finally:
            for other in fleet.cluster.workers:
                if other.running:
                    other.kill(signal.SIGCONT)
        assert [event.target.replica_id for event in moved] == [heir]
        assert len(tokens) == 48
        assert tokens == undisturbed
        assert first.usage.output_tokens == 24


async def tokens_of(session: Session, text: str, max_tokens: int) -> list[int]:
    tokens: list[int] = []
    turn = session.run(text, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout_s=240)
    async with aclosing(aiter(turn)) as events:
        async for event in events:
            if isinstance(event, Tokens):
                tokens += event.token_ids
    return tokens


@pytest.mark.essential
async def test_an_idle_session_takes_its_kv_along(fleet: Fleet) -> None:
    await fleet.replica("s1")
    await fleet.replica("s2")
    async with fleet.client() as client, fleet.client() as other_tenant:
        session = await client.open(system=LONG)
        await said(session, STORY, 8)
        source = (await session.refresh()).owner
        assert source is not None
        target = "s2" if source.replica_id == "s1" else "s1"
        if source.replica_id not in ("s1", "s2"):
            await on(client, session, "s1")
        length = (await session.refresh()).head.length
        moved = await client.fleet.migrate(session.session_id, target=target)
        assert moved.moved, moved.detail
        assert moved.verified_tokens >= length - 16 - 8, moved
        assert moved.bytes_copied > 0
        after = await said(session, "And then?", 24)
        owner = (await session.refresh()).owner
        assert owner is not None
        assert owner.replica_id == target
        assert after.usage.cached_tokens >= moved.verified_tokens

        # The same words of another tenant, who shares no cache with this one, computed anew.
        anew = await other_tenant.open(system=LONG)
        await said(anew, STORY, 8)
        assert (await said(anew, "And then?", 24)).text == after.text


async def test_a_drained_replica_gives_its_sessions_away_with_their_kv(fleet: Fleet) -> None:
    await fleet.replica("s1")
    await fleet.replica("s2")
    async with fleet.client() as client:
        session = await client.open(system=LONG)
        await said(session, STORY, 8)
        await on(client, session, "s1")
        before = await said(session, "And then?", 8)
        async with aclosing(client.fleet.drain("s1", timeout_s=120)) as steps:
            progress = [step async for step in steps]
        assert progress[-1].done
        assert (progress[-1].remaining, progress[-1].moved_without_kv) == (0, 0)
        drained = [child for child in fleet.cluster.workers if child.name == "s1"]
        await fleet.cluster.stop(drained)  # it is of no more use to anybody
        after = await said(session, "And what happened to the whales?", 8)
        assert after.usage.cached_tokens >= before.usage.input_tokens - 16


async def test_the_crash_of_a_scheduler_is_the_end_of_its_replica(fleet: Fleet) -> None:
    replica = await fleet.replica("s2")
    await fleet.replica("t1")
    async with fleet.client() as client:
        session = await client.open(system="Be brief.")
        await said(session, STORY, 8)
        await on(client, session, "s2")
        children = psutil.Process(replica.pid).children()
        schedulers = [c for c in children if "scheduler" in " ".join(c.cmdline())]
        assert schedulers
        os.kill(schedulers[0].pid, signal.SIGKILL)
        assert await anyio.to_thread.run_sync(lambda: replica.process.wait(30)) == 1
        assert (await said(session, "And then?", 8)).usage.output_tokens == 8


async def test_where_sglang_shares_its_storage_the_next_owner_has_the_context_before_its_turn(
    fleet: Fleet,
) -> None:
    for name in ("o1", "o2"):
        await fleet.replica(name)
    async with fleet.client() as client:
        session = await client.open(system=LONG)
        await said(session, STORY, 8)
        await on(client, session, "o1")
        before = await said(session, "And then?", 8)
        context = before.usage.input_tokens + before.usage.output_tokens
        for _ in range(300):
            if len(list(fleet.storage.iterdir())) >= context // 16:
                break
            await anyio.sleep(0.1)  # sglang writes behind the scenes
        moved = await client.fleet.migrate(session.session_id, target="o2")
        assert moved.moved, moved.detail
        assert moved.bytes_copied == 0
        assert moved.verified_tokens >= context - 16
        assert not moved.detail, "all of it was in the storage"
        after = await said(session, "And what happened to the whales?", 8)
        assert after.usage.cached_tokens >= context - 16


async def test_sglangs_spans_are_in_the_trace_of_the_session(fleet: Fleet) -> None:
    await fleet.replica("o1")
    async with fleet.client() as client:
        session = await client.open(system="Be brief.")
        await said(session, STORY, 4)
        await on(client, session, "o1")
        await said(session, "And then?", 4)

        def found() -> bool:
            turns = fleet.traces.of("run turn", session_id=session.session_id)
            traces = {span.trace_id for span in turns}
            spans = [span for trace in traces for span in fleet.traces.in_trace(trace)]
            return any(not span.service.startswith("sessile") for span in spans)

        await fleet.traces.until(found)
