"""One trace from the client to the replicas, across a kill and a move; the session's own trace
beside it. Real processes export to a receiver that the test runs."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from sessile import Moved, ReplicaState, Runtime, Sessile, Tokens

from gateway.cli.launch import Child, Cluster
from gateway.telemetry.tracing import session_context
from tests.support.otlp import ReceivedSpan, Receiver, receiver
from tests.support.patience import PATIENT

pytestmark = pytest.mark.anyio

EXPORT_MS = "200"
LONG = 300
"""Tokens of a turn that something happens to: it still runs then, even if a process has stood still
for some seconds."""


class First(random.Random):
    """Has a client start at the first of its gateways."""

    def randrange(self, *args: object, **kwargs: object) -> int:
        return 0


class Fleet(Cluster):
    received: Receiver

    def worker(self, name: str) -> Child:
        return next(child for child in reversed(self.workers) if child.name == name)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def fleet(
    anyio_backend: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    with receiver() as received:
        fleet = Fleet(
            engine_options={"step_ms": "10", "decode_token_ms": "0", "eos_probability": "0"},
            log_directory=tmp_path_factory.mktemp("logs"),
            environment={
                **PATIENT,
                "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": EXPORT_MS,
                "OTEL_METRICS_EXPORTER": "none",
            },
        )
        fleet.received = received
        async with fleet:
            await fleet.start(gateways=1, workers=3)
            yield fleet


def of_client(received: Receiver) -> TracerProvider:
    """What an application sets up for itself."""
    provider = TracerProvider(resource=Resource.create({"service.name": "agent"}))
    exporter = OTLPSpanExporter(endpoint=received.endpoint)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def own_trace(session_id: str) -> str:
    return f"{session_context(session_id).trace_id:032x}"


def chain(spans: list[ReceivedSpan], leaf: ReceivedSpan) -> list[str]:
    """Service and name of a span and of those above it, the root first."""
    by_id = {span.span_id: span for span in spans}
    found: list[str] = []
    span: ReceivedSpan | None = leaf
    while span is not None:
        found.insert(0, f"{span.service}: {span.name}")
        span = by_id.get(span.parent_id)
    return found


async def test_one_trace_holds_a_turn_from_its_client_to_both_replicas_across_a_kill(
    fleet: Fleet,
) -> None:
    received, provider = fleet.received, of_client(fleet.received)
    async with Sessile(fleet.targets, tracer_provider=provider) as client:
        session = await client.open(system="Be brief.")
        moves: list[Moved] = []
        tokens = 0
        with provider.get_tracer("agent").start_as_current_span("work") as work:
            trace_id = f"{work.get_span_context().trace_id:032x}"
            async for event in session.run("Go on.", max_tokens=LONG, ignore_eos=True):
                if isinstance(event, Tokens):
                    tokens += len(event.token_ids)
                    if tokens >= 15 and not moves:
                        owner = (await session.refresh()).owner
                        assert owner is not None
                        fleet.worker(owner.replica_id).kill()
                elif isinstance(event, Moved):
                    moves.append(event)
        assert tokens == LONG
        (move,) = moves
        session_id = session.session_id
        await received.until(lambda: received.of("run turn", session_id=session_id))
        await received.until(lambda: len(received.of("turn", session_id=session_id)) == 2)
        await received.until(lambda: received.of("work"))

    spans = received.in_trace(trace_id)
    named = {span.name: span for span in spans}
    (run,) = [span for span in spans if span.name == "run turn"]
    assert run.instance == move.target.replica_id
    assert chain(spans, run) == [
        "agent: work",
        "agent: chat sim",
        "sessile-gateway: turn",
        "sessile-gateway: dispatch",
        "sessile-worker: run turn",
    ]
    assert run.attributes["sessile.attempt"] == 2
    assert run.attributes["sessile.resumed_tokens"] >= 15
    assert {span.name for span in spans if span.parent_id == run.span_id} >= {
        *("open", "queue", "prefill", "decode", "group commit")
    }
    prefill = next(s for s in spans if s.name == "prefill" and s.parent_id == run.span_id)
    assert prefill.attributes["sessile.computed_tokens"] > 0
    lost, again = sorted(
        (span for span in spans if span.name == "dispatch"), key=lambda span: span.began_ns
    )
    assert lost.failed
    assert not again.failed
    assert lost.attributes["sessile.replica"].startswith(move.source.replica_id)
    failover, turn = named["failover"], named["turn"]
    assert failover.parent_id == turn.span_id
    assert 0 < failover.seconds < turn.seconds
    placements = sorted(
        (span for span in spans if span.name == "place"), key=lambda span: span.began_ns
    )
    first, second = placements
    assert first.attributes["sessile.cause"] == "placement"
    assert second.attributes["sessile.cause"] == "failover"
    assert len(first.attributes["sessile.placement.candidates"]) == 3
    costs = first.attributes["sessile.placement.cost_ms"]
    assert costs == sorted(costs)
    lost_name = move.source.replica_id
    assert any(lost_name in why for why in second.attributes["sessile.placement.excluded"])
    assert turn.attributes["gen_ai.usage.output_tokens"] == LONG
    assert turn.attributes["gen_ai.request.model"] == "sim"
    assert named["group commit"].attributes["sessile.commits"] > 1
    client_span = named["chat sim"]
    assert client_span.attributes["gen_ai.usage.output_tokens"] == LONG
    assert client_span.events == ("first token", "moved")
    # The session's own trace shows the turn too, and each says where the other is.
    own = own_trace(session.session_id)
    assert turn.links == ((own, received.of("session")[0].span_id),)
    (mirror,) = [span for span in received.in_trace(own) if span.name == "turn"]
    assert mirror.links == ((trace_id, turn.span_id),)
    assert mirror.attributes["gen_ai.usage.output_tokens"] == LONG


async def test_a_turn_that_is_moved_stays_in_its_trace_whoever_moved_it(fleet: Fleet) -> None:
    received, provider = fleet.received, of_client(fleet.received)
    operator = of_client(received)
    async with (
        Sessile(fleet.targets, tracer_provider=provider) as client,
        Sessile(fleet.targets, tracer_provider=operator) as mover,
    ):
        session = await client.open()
        await session.run("First.", max_tokens=40, ignore_eos=True).result()
        tokens = 0
        async for event in session.run("Go on.", max_tokens=LONG, ignore_eos=True):
            if isinstance(event, Tokens):
                before, tokens = tokens, tokens + len(event.token_ids)
                if before < 20 <= tokens:
                    with operator.get_tracer("operator").start_as_current_span("ops") as ops:
                        moved_in = f"{ops.get_span_context().trace_id:032x}"
                        result = await mover.fleet.migrate(session.session_id)
        assert result.moved, result.detail
        assert tokens == LONG
        session_id = session.session_id
        await received.until(lambda: len(received.of("run turn", session_id=session_id)) == 3)
        await received.until(lambda: len(received.of("migrate", session_id=session_id)) == 2)
        await received.until(lambda: len(received.of("turn", session_id=session_id)) == 4)

    source, target = sorted(
        received.of("run turn", session_id=session_id), key=lambda span: span.began_ns
    )[1:]
    assert source.trace_id == target.trace_id != moved_in
    assert source.attributes["sessile.outcome"] == "redirected"
    assert target.attributes["sessile.attempt"] == 2
    assert target.instance != source.instance
    # The move itself is the operator's, phase by phase, down to the target that pulls.
    spans = received.in_trace(moved_in)
    migrate = next(span for span in spans if span.name == "migrate")
    phases = [span.name for span in sorted(spans, key=lambda span: span.began_ns)]
    assert [name for name in phases if name in ("begin", "copy", "hold", "switch", "finish")] == (
        ["begin", *["copy"] * phases.count("copy"), "hold", "switch", "finish"]
        if phases.index("hold") > max(i for i, n in enumerate(phases) if n == "copy")
        else ["begin", "copy", "hold", *["copy"] * (phases.count("copy") - 1), "switch", "finish"]
    )
    assert chain(spans, next(span for span in spans if span.name == "pull KV"))[-4:] == [
        "sessile-gateway: migrate",
        "sessile-gateway: copy",
        "sessile-worker: import",
        "sessile-worker: pull KV",
    ]
    assert migrate.attributes["sessile.mode"] == "running_with_kv"
    assert migrate.attributes["sessile.migration.bytes_copied"] > 0


async def test_without_a_caller_s_trace_the_session_s_own_shows_its_life(fleet: Fleet) -> None:
    received = fleet.received
    async with Sessile(fleet.targets) as client:
        session = await client.open(system="Be brief.")
        session_id, trace_id = session.session_id, own_trace(session.session_id)
        for prompt in ("One.", "Two."):
            await session.run(prompt, max_tokens=8, ignore_eos=True).result()
        ready = [r for r in await client.fleet.replicas() if r.state is ReplicaState.READY]
        assert len(ready) >= 2
        moved = await client.fleet.migrate(session_id)
        assert moved.moved, moved.detail
        await session.run("Three.", max_tokens=8, ignore_eos=True).result()
        fork = await session.fork()
        await session.suspend()
        await session.resume()
        await session.close()
        await received.until(lambda: received.of("close", session_id=session_id))
        await received.until(lambda: len(received.of("run turn", session_id=session_id)) == 3)
        await received.until(lambda: received.of("session", session_id=fork.session_id))
        await received.until(lambda: received.of("import", session_id=session_id))

    life = received.of_session(session_id)
    assert {span.trace_id for span in life} == {trace_id}
    (root,) = [span for span in life if span.name == "session"]
    assert root.parent_id == ""
    top = sorted((s for s in life if s.parent_id == root.span_id), key=lambda s: s.began_ns)
    assert [span.name for span in top if span.name not in ("tool gap",)] == [
        *("turn", "turn", "migrate", "turn", "fork", "suspend", "resume", "close")
    ]
    gaps, turns = [s for s in top if s.name == "tool gap"], [s for s in top if s.name == "turn"]
    assert len(gaps) == 2
    for gap, before, after in zip(gaps, turns, turns[1:], strict=False):
        assert before.began_ns < gap.began_ns <= gap.ended_ns < after.ended_ns
        assert gap.links[0][0] == trace_id
    # Everything has its place under the root, and the id that a search would be for.
    assert {"place", "dispatch", "run turn", "open", "queue", "prefill", "decode", "copy"} <= {
        span.name for span in life
    }
    ids = {span.span_id for span in life}
    assert all(span.parent_id in ids for span in life if span is not root)
    assert all(s.attributes["gen_ai.conversation.id"] == session_id for s in life)
    second = sorted((s for s in life if s.name == "prefill"), key=lambda s: s.began_ns)[1]
    assert second.attributes["gen_ai.usage.cache_read.input_tokens"] > 0
    (forked,) = received.of("session", session_id=fork.session_id)
    assert forked.trace_id == own_trace(fork.session_id)
    assert forked.links == ((trace_id, root.span_id),)


async def test_a_turn_whose_gateway_is_killed_goes_on_in_its_trace(fleet: Fleet) -> None:
    received, provider = fleet.received, of_client(fleet.received)
    doomed = await fleet.start_gateway()
    other = next(child for child in fleet.gateways if child is not doomed and child.running)
    async with Sessile(doomed.address) as first:
        session_id = (await first.open()).session_id
    async with Sessile(
        [doomed.address, other.address], tracer_provider=provider, runtime=Runtime(rng=First())
    ) as client:
        tokens = 0
        async for event in client.session(session_id).run("Go.", max_tokens=LONG, ignore_eos=True):
            if isinstance(event, Tokens):
                tokens += len(event.token_ids)
                if tokens >= 15 and doomed.running:
                    doomed.kill()
        assert tokens == LONG
        await received.until(lambda: received.of("run turn", session_id=session_id))
        await received.until(lambda: len(received.of("turn", session_id=session_id)) == 2)
        await received.until(lambda: received.of("chat", session_id=session_id))

    (chat,) = received.of("chat", session_id=session_id)
    assert "connected again" in chat.events
    spans = received.in_trace(chat.trace_id)
    # The run never noticed: one attempt, whose dispatch died unexported.
    (run,) = [span for span in spans if span.name == "run turn"]
    assert run.attributes["sessile.attempt"] == 1
    (turn,) = [span for span in spans if span.name == "turn"]
    assert turn.parent_id == chat.span_id
    assert turn.service == "sessile-gateway"
    assert turn.attributes["gen_ai.usage.output_tokens"] == LONG
