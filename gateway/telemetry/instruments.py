"""Every metric of Sessile: name, unit, kind, attributes, buckets.

Attributes take few values each: replicas, sessions and turns are never among them (a resource names
the process). Durations are in seconds. ``gateway/telemetry/metrics.py`` records them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

from gateway.telemetry import attributes as a

Kind = Literal["counter", "histogram", "gauge"]
QUICK = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. ``unit`` is in UCUM; ``attributes`` are all that it may have."""

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's."""


def _table(*instruments: Instrument) -> dict[str, Instrument]:
    return {one.name: one for one in instruments}


REQUEST_DURATION = gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION
TTFT = gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN
TIME_PER_TOKEN = gen_ai_metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN

GATEWAY = _table(
    Instrument(
        REQUEST_DURATION,
        "histogram",
        "s",
        "RunTurn streams, from the call to their end",
        (a.OPERATION, a.PROVIDER, a.MODEL, a.STATUS, a.ERROR_TYPE, a.TENANT),
        WHOLE,
    ),
    Instrument(
        TTFT,
        "histogram",
        "s",
        "RunTurn streams that are not repeats, from the call to the first token passed on",
        (a.OPERATION, a.PROVIDER, a.MODEL, a.PRIORITY, a.TENANT),
        FIRST_TOKEN,
    ),
    Instrument("sessile.streams", "gauge", "{stream}", "RunTurn streams that are open"),
    Instrument(
        "sessile.failover.gap",
        "histogram",
        "s",
        "From what was last heard of a lost replica's stream to the first token of the next one",
        (a.CAUSE,),
        (*QUICK, 10.0, 30.0),
    ),
    Instrument(
        "sessile.epochs.taken",
        "counter",
        "{epoch}",
        "Ownerships written: a first placement, a take-over from a lost replica, relief of a full "
        "one, a move",
        (a.CAUSE,),
    ),
    Instrument(
        "sessile.migrations",
        "counter",
        "{move}",
        "Moves tried: asked for by whom, of an idle session or a running turn, with or without KV",
        (a.CAUSE, a.MODE, a.OUTCOME),
    ),
    Instrument(
        "sessile.migration.duration",
        "histogram",
        "s",
        "Moves tried, from their begin to their end",
        (a.CAUSE, a.MODE, a.OUTCOME),
        (*QUICK, 10.0, 30.0, 60.0),
    ),
    Instrument("sessile.migration.copied", "counter", "By", "KV copied by moves between replicas"),
    Instrument(
        "sessile.replicas",
        "gauge",
        "{replica}",
        "Replicas as this gateway judges them",
        (a.STATE,),
    ),
    Instrument(
        "sessile.calls.failed",
        "counter",
        "{call}",
        "Calls that ended with an error, by its reason",
        (a.ERROR_TYPE,),
    ),
)

WORKER = _table(
    Instrument(
        "sessile.turns",
        "counter",
        "{turn}",
        "Turns that this replica ended in the ledger, by how and why",
        (a.MODEL, a.STATUS, a.CAUSE, a.TENANT),
    ),
    Instrument(
        "sessile.tokens",
        "counter",
        "{token}",
        "Tokens of contexts found in the cache or computed, once an attempt; tokens of output",
        (a.MODEL, a.KIND, a.TENANT),
    ),
    Instrument(
        "sessile.prompt.cached_ratio",
        "histogram",
        "1",
        "Share of an attempt's context whose KV was found in the cache",
        (a.MODEL,),
        SHARES,
    ),
    Instrument(
        TIME_PER_TOKEN,
        "histogram",
        "s",
        "Mean time between tokens, one value a turn",
        (a.OPERATION, a.PROVIDER, a.MODEL),
        QUICK,
    ),
    Instrument(
        "sessile.inter_token.time",
        "histogram",
        "s",
        "Time between releases of a turn's tokens, over their number",
        (a.MODEL,),
        QUICK,
    ),
    Instrument("sessile.turns.running", "gauge", "{turn}", "Turns that the engine computes"),
    Instrument("sessile.turns.queued", "gauge", "{turn}", "Turns that wait here"),
    Instrument(
        "sessile.kv.pages",
        "gauge",
        "{page}",
        "KV pages: used by turns, transfers and imports, or free (cache that may be evicted among "
        "them)",
        (a.STATE,),
    ),
    Instrument(
        "sessile.kv.pinned",
        "gauge",
        "{page}",
        "KV pages, used or free, that sessions at rest are expected to want again",
    ),
    Instrument("sessile.kv.pulled", "counter", "By", "KV pulled from peers by this replica"),
    Instrument(
        "sessile.group_commit.duration",
        "histogram",
        "s",
        "Pipelines of appends to the store, from sending to the answer",
        (),
        QUICK,
    ),
    Instrument(
        "sessile.group_commit.appends",
        "histogram",
        "{append}",
        "Appends in one pipeline",
        (),
        COUNTS,
    ),
    Instrument(
        "sessile.writes.fenced",
        "counter",
        "{write}",
        "Writes of the ledger that the store refused because another replica owns the session",
        (a.WRITE,),
    ),
    Instrument(
        "sessile.repairs",
        "counter",
        "{repair}",
        "Times this replica put back what the store had lost",
    ),
    Instrument("sessile.ledger.written", "counter", "By", "Bytes appended to ledgers"),
    Instrument(
        "sessile.ledger.held",
        "gauge",
        "By",
        "Ledger bytes of the sessions that this replica owns, inherited ones among them",
    ),
    Instrument("sessile.sessions.held", "gauge", "{session}", "Sessions that this replica owns"),
)

INSTRUMENTS = {**GATEWAY, **WORKER}
