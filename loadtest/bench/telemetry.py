"""What traces and metrics cost a turn: CPU of client, gateway and worker together, by mode.

    python -m loadtest.bench.telemetry [--rounds 5] [--turns 40] [--json FILE]

All three run in this process on one event loop over a private store, so that its CPU time is all of
theirs. Modes take turns, in changing order; each figure is a median over the rounds. Turns of two
lengths tell what a turn costs from what a message with tokens costs. Spans are encoded as for OTLP
by the exporter's thread and then dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import anyio
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from sessile import Sessile

from gateway.config import GatewayConfig
from gateway.main import serve as serve_gateway
from statestore.embedded import embedded_server
from telemetry.setup import OFF, Telemetry
from telemetry.tracing import Tracing
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


@contextmanager
def traces(ratio: float) -> Iterator[Telemetry]:
    """Traces alone; ``ratio`` of the sessions are sampled."""
    sampler = ParentBasedTraceIdRatio(ratio)
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Dropped()))
    yield Telemetry(tracer_provider=provider)
    provider.shutdown()


@contextmanager
def metrics() -> Iterator[Telemetry]:
    """Metrics alone, collected by nobody."""
    provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    yield Telemetry(meter_provider=provider)
    provider.shutdown()


@contextmanager
def off() -> Iterator[Telemetry]:
    """Neither."""
    yield OFF


MODES: dict[str, Callable[[], AbstractContextManager[Telemetry]]] = {
    "off": off,
    "traces, not sampled": partial(traces, 0.0),
    "traces, sampled": partial(traces, 1.0),
    "metrics": metrics,
}


@asynccontextmanager
async def fleet(url: str, telemetry: Telemetry) -> AsyncIterator[Sessile]:
    """A gateway, a worker with an engine that waits a millisecond a step, and a client."""
    options = (("step_ms", "1"), ("decode_token_ms", "0"), ("eos_probability", "0"))
    worker = WorkerConfig(
        redis_url=url, replica=ReplicaSettings(replica_id="w"), engine_options=options
    )
    gateway = GatewayConfig(listen="127.0.0.1:0", redis_url=url)
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        await tasks.start(partial(serve_worker, worker, stop=stop, telemetry=telemetry))
        target = await tasks.start(partial(serve_gateway, gateway, stop=stop, telemetry=telemetry))
        async with Sessile([target]) as client:
            yield client
        stop.set()


async def cpu_per_turn(client: Sessile, tokens: int, turns: int) -> float:
    """Seconds of this process's CPU time, mean over turns of one session."""
    session = await client.open()
    for number in range(WARM_UP + turns):
        if number == WARM_UP:
            began = time.process_time()
        await session.run("Go on.", max_tokens=tokens, ignore_eos=True).result()
    lasted = time.process_time() - began
    await session.close(purge=True)
    return lasted / turns


async def measure(rounds: int, turns: int) -> dict[str, dict[str, float]]:
    """µs by mode: of a turn, and of a token more."""
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    order = list(MODES)
    async with embedded_server(None) as url:
        for number in range(rounds):
            random.Random(number).shuffle(order)
            for mode in order:
                with MODES[mode]() as telemetry:
                    async with fleet(url, telemetry) as client:
                        short = await cpu_per_turn(client, SHORT, turns)
                        long = await cpu_per_turn(client, LONG, turns // 4)
                found[mode].append((short, long))
    figures: dict[str, dict[str, float]] = {}
    for mode, pairs in found.items():
        short = statistics.median(pair[0] for pair in pairs)
        token = statistics.median((long - brief) / (LONG - SHORT) for brief, long in pairs)
        figures[mode] = {"turn_us": short * 1e6, "token_us": token * 1e6}
    return figures


def cost_of_nothing() -> dict[str, float]:
    """ns of a call where nothing is recorded: what is in the code all the same."""
    tracing = Tracing("bench")

    def session_span() -> None:
        with tracing.session_span("turn", "ses_a"):
            pass

    def span() -> None:
        with tracing.span("place", "ses_a"):
            pass

    def past() -> None:
        tracing.past("prefill", "ses_a", ago_s=1.0, lasted_s=1.0)

    found: dict[str, float] = {}
    for call in (session_span, span, past):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found[call.__name__] = (time.perf_counter() - began) / CALLS * 1e9
    return found


def main() -> None:
    """Prints the table, and writes the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=40, help="short ones a round and mode")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = anyio.run(measure, options.rounds, options.turns)
    base = figures["off"]
    print(f"{'mode':22} {'turn of 8 tokens':>18} {'more than off':>14} {'a token':>9} {'more':>7}")  # noqa: T201
    for mode, one in figures.items():
        more, token = one["turn_us"] - base["turn_us"], one["token_us"] - base["token_us"]
        print(  # noqa: T201
            f"{mode:22} {one['turn_us']:15.0f} µs {more:11.0f} µs {one['token_us']:6.0f} µs "
            f"{token:4.0f} µs"
        )
    nothing = cost_of_nothing()
    print("calls that record nothing:", {k: f"{v:.0f} ns" for k, v in nothing.items()})  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps({"modes": figures, "nothing_ns": nothing}, indent=2))


if __name__ == "__main__":
    main()
