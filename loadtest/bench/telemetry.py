"""What traces and metrics cost a turn: CPU of client, gateway and worker together, by mode.

    python -m loadtest.bench.telemetry [--turns 150] [--json FILE]

For each mode a client, a gateway and a worker, all in this process on one event loop over one
private store, so that its CPU time is theirs. Modes take turns by single turns, in changing order,
so that what else the machine does meets all alike; figures are medians. Turns of two lengths tell
what a turn costs from what a step of one token costs. Spans are encoded as for OTLP when their turn
is over, within what is measured, and then dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from sessile import Sessile, Session

from gateway.config import GatewayConfig
from gateway.main import serve as serve_gateway
from gateway.telemetry import attributes as a
from gateway.telemetry.logs import about
from gateway.telemetry.metrics import GatewayMetrics, WorkerMetrics
from gateway.telemetry.propagation import attach_caller, headers, injected
from gateway.telemetry.setup import OFF, Telemetry
from gateway.telemetry.tracing import Tracing, traceparent
from statestore.embedded import embedded_server
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import serve as serve_worker

SHORT, LONG = 8, 136
"""Tokens of the two kinds of turns; the engine gives one a step."""
WARM_UP = 8
CALLS = 20_000


class Dropped(SpanExporter):
    """Encodes, and sends nothing."""

    spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += len(spans)
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


@dataclass(frozen=True, slots=True)
class Mode:
    """``flush`` exports what a turn has recorded."""

    telemetry: Telemetry
    flush: Callable[[], object] = lambda: None


def modes() -> dict[str, Mode]:
    """What is compared; none of it is the process's global provider."""
    made = {"off": Mode(OFF)}
    for name, ratio in (("traces, not sampled", 0.0), ("traces, sampled", 1.0)):
        sampler = ParentBasedTraceIdRatio(ratio)
        tracers = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        tracers.add_span_processor(BatchSpanProcessor(Dropped()))
        made[name] = Mode(Telemetry(tracer_provider=tracers), tracers.force_flush)
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    made["metrics"] = Mode(Telemetry(meter_provider=meters))
    return made


@asynccontextmanager
async def fleet(url: str, name: str, mode: Mode) -> AsyncIterator[Sessile]:
    """A gateway, a worker with an engine that waits a millisecond a step, and a client. The workers
    serve models of different names, so that each gateway uses its own."""
    options = (
        ("model", name),
        ("step_ms", "1"),
        ("decode_token_ms", "0"),
        ("eos_probability", "0"),
    )
    replica = ReplicaSettings(replica_id=name)
    worker = WorkerConfig(redis_url=url, replica=replica, engine_options=options)
    gateway = GatewayConfig(listen="127.0.0.1:0", redis_url=url)
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        telemetry = mode.telemetry
        await tasks.start(partial(serve_worker, worker, stop=stop, telemetry=telemetry))
        target = await tasks.start(partial(serve_gateway, gateway, stop=stop, telemetry=telemetry))
        async with Sessile([target]) as client:
            yield client
        stop.set()


async def turn_cpu_s(session: Session, mode: Mode, tokens: int) -> float:
    """CPU time of this process while a turn runs, and is exported."""
    began = time.process_time()
    await session.run("Go on.", max_tokens=tokens, ignore_eos=True).result()
    mode.flush()
    return time.process_time() - began


async def measure(turns: int) -> dict[str, dict[str, float]]:
    """µs by mode: of a short turn, and of a step more."""
    compared = modes()
    taken: dict[tuple[str, int], list[float]] = {
        (name, tokens): [] for name in compared for tokens in (SHORT, LONG)
    }
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(embedded_server(None))
        sessions: dict[str, Session] = {}
        for number, (name, mode) in enumerate(compared.items()):
            model = f"mode-{number}"
            client = await stack.enter_async_context(fleet(url, model, mode))
            sessions[name] = await client.open(model=model)
        for number in range(WARM_UP + turns):
            order = list(compared)
            random.Random(number).shuffle(order)
            for tokens in (SHORT, LONG) if number % 3 == 0 else (SHORT,):
                for name in order:
                    cpu_s = await turn_cpu_s(sessions[name], compared[name], tokens)
                    if number >= WARM_UP:
                        taken[name, tokens].append(cpu_s)
    figures: dict[str, dict[str, float]] = {}
    for name in compared:
        short = statistics.median(taken[name, SHORT])
        long = statistics.median(taken[name, LONG])
        figures[name] = {"turn_us": short * 1e6, "step_us": (long - short) / (LONG - SHORT) * 1e6}
    return figures


def cost_of_nothing() -> dict[str, float]:
    """µs of what a turn calls where nothing is recorded, in gateway and worker: what is in the code
    all the same; and of what a step calls."""
    tracing, gateway, worker = Tracing("bench"), GatewayMetrics(), WorkerMetrics()
    metadata = [("user-agent", "bench"), ("x-sessile-tenant", "bench")]

    def turn() -> None:
        attach_caller(metadata)
        with about("ses_a", "t"), tracing.session_span("turn", "ses_a", {**a.CHAT, a.TURN: "t"}):
            with tracing.span("dispatch", "ses_a", dict(a.CHAT)):
                injected()
            gateway.first_token("m", "t", "interactive", 0.1)
            gateway.stream_ended("m", "t", 1.0, "committed", "")
        attach_caller(metadata)
        says = {**a.CHAT, a.TURN: "t"}
        with about("ses_a", "t"), tracing.resumed_span("run turn", "ses_a", "", says):
            with tracing.span("open", "ses_a"):
                traceparent()
                tracing.gap("ses_a", "tool gap", 1, 2)
            headers()
            for name in ("queue", "prefill", "decode", "group commit"):
                tracing.past(name, "ses_a", ago_s=1.0, lasted_s=1.0)
            worker.prompt("t", 10, 20)
            worker.turn_ended("t", "committed", "stop", 0.01)

    def step() -> None:
        worker.committed(1, 0.001)
        worker.appended(1)
        worker.released("t", 1, 0.01)

    found: dict[str, float] = {}
    for call in (turn, step):
        times = []
        for _ in range(CALLS):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        found[call.__name__] = statistics.median(times) * 1e6
    return found


def main() -> None:
    """Prints the table, and writes the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=150, help="short ones a mode; long: a third")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = anyio.run(measure, options.turns)
    base = figures["off"]
    print(f"{'mode':20} {'turn':>9} {'more':>9} {'step':>9} {'more':>9}   (us of CPU)")
    for name, one in figures.items():
        turn, step = one["turn_us"], one["step_us"]
        more = (turn - base["turn_us"], step - base["step_us"])
        print(f"{name:20} {turn:9.0f} {more[0]:9.0f} {step:9.1f} {more[1]:9.1f}")
    nothing = cost_of_nothing()
    print(f"off, its own calls: {nothing['turn']:.1f} a turn, {nothing['step']:.1f} a step")
    if options.json:
        options.json.write_text(json.dumps({"modes": figures, "off_us": nothing}, indent=2))


if __name__ == "__main__":
    main()
