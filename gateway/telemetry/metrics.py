"""What records metrics: one class for gateways, one for workers, so that a name occurs once.

Observed values are read by an exporter's thread: they are numbers that the event loop put here
before, never the live objects.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from gateway.telemetry import attributes as a
from gateway.telemetry.instruments import (
    GATEWAY,
    REQUEST_DURATION,
    TIME_PER_TOKEN,
    TTFT,
    WORKER,
    Instrument,
    Kind,
)

Labels = dict[str, str]

MAX_TENANTS = 100
OTHER_TENANTS = "(others)"


class Tenants:
    """Tenants as an attribute: none unless asked for, and a bounded number."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._known: set[str] = set()

    def label(self, tenant: str) -> Labels:
        if not self._enabled:
            return {}
        if tenant not in self._known:
            if len(self._known) >= MAX_TENANTS:
                return {a.TENANT: OTHER_TENANTS}
            self._known.add(tenant)
        return {a.TENANT: tenant}


class GatewayMetrics:
    """What a gateway records. Without a meter of the SDK, nothing."""

    def __init__(self, meter: Meter | None = None, *, tenant_labels: bool = False) -> None:
        make = _Maker(meter, GATEWAY)
        self._tenants = Tenants(tenant_labels)
        self._duration = make.histogram(REQUEST_DURATION)
        self._ttft = make.histogram(TTFT)
        self._gap = make.histogram("sessile.failover.gap")
        self._epochs = make.counter("sessile.epochs.taken")
        self._moves = make.counter("sessile.migrations")
        self._move_duration = make.histogram("sessile.migration.duration")
        self._copied = make.counter("sessile.migration.copied")
        self._failed = make.counter("sessile.calls.failed")
        self._replicas: Mapping[str, int] = {}
        self._streams: Callable[[], int] = int
        make.gauge("sessile.replicas", lambda: self._replicas, a.STATE)
        make.gauge("sessile.streams", lambda: {"": self._streams()})

    def stream_ended(
        self, model: str, tenant: str, duration_s: float, status: str, error: str
    ) -> None:
        """``status``: of the turn, empty if its end was not seen; ``error``: why the stream failed,
        or empty."""
        labels = {**a.CHAT, a.MODEL: model, **self._tenants.label(tenant)}
        if status:
            labels[a.STATUS] = status
        if error:
            labels[a.ERROR_TYPE] = error
        self._duration.record(duration_s, labels)

    def first_token(self, model: str, tenant: str, priority: str, after_s: float) -> None:
        labels = {**a.CHAT, a.MODEL: model, a.PRIORITY: priority, **self._tenants.label(tenant)}
        self._ttft.record(after_s, labels)

    def failed_over(self, gap_s: float, cause: str) -> None:
        self._gap.record(gap_s, {a.CAUSE: cause})

    def epoch_taken(self, cause: str) -> None:
        self._epochs.add(1, {a.CAUSE: cause})

    def moved(
        self, *, cause: str, mode: str, outcome: str, duration_s: float, bytes_copied: int
    ) -> None:
        labels = {a.CAUSE: cause, a.MODE: mode, a.OUTCOME: outcome}
        self._moves.add(1, labels)
        self._move_duration.record(duration_s, labels)
        if bytes_copied:
            self._copied.add(bytes_copied)

    def call_failed(self, reason: str) -> None:
        self._failed.add(1, {a.ERROR_TYPE: reason})

    def fleet(self, states: Iterable[str]) -> None:
        """The states of all replicas, as they are now."""
        before = dict.fromkeys(self._replicas, 0)  # a state that nobody is in any more is 0
        self._replicas = {**before, **Counts(states)}

    def count_streams(self, streams: Callable[[], int]) -> None:
        """``streams``: may be called from any thread."""
        self._streams = streams


class WorkerMetrics:
    """What a worker records. Without a meter of the SDK, nothing."""

    def __init__(
        self, meter: Meter | None = None, *, model: str = "", tenant_labels: bool = False
    ) -> None:
        self._on = meter is not None
        make = _Maker(meter, WORKER)
        self._tenants = Tenants(tenant_labels)
        self._model: Labels = {a.MODEL: model}
        self._chat: Labels = {**a.CHAT, a.MODEL: model}
        self._turns = make.counter("sessile.turns")
        self._tokens = make.counter("sessile.tokens")
        self._cached = make.histogram("sessile.prompt.cached_ratio")
        self._per_token = make.histogram(TIME_PER_TOKEN)
        self._between = make.histogram("sessile.inter_token.time")
        self._pulled = make.counter("sessile.kv.pulled")
        self._commit = make.histogram("sessile.group_commit.duration")
        self._appends = make.histogram("sessile.group_commit.appends")
        self._fenced = make.counter("sessile.writes.fenced")
        self._repairs = make.counter("sessile.repairs")
        self._written = make.counter("sessile.ledger.written")
        self._gauges: dict[str, int] = {}
        self._pages: Mapping[str, int] = {}
        make.gauge("sessile.kv.pages", lambda: self._pages, a.STATE)
        for name in (
            "sessile.turns.running",
            "sessile.turns.queued",
            "sessile.kv.pinned",
            "sessile.ledger.held",
            "sessile.sessions.held",
        ):
            make.gauge(name, partial(self._gauge, name))

    def _gauge(self, name: str) -> Mapping[str, int]:
        return {"": self._gauges.get(name, 0)}

    def prompt(self, tenant: str, cached: int, context: int) -> None:
        """An attempt found ``cached`` of its ``context`` tokens and has computed the rest."""
        labels = {**self._model, **self._tenants.label(tenant)}
        self._tokens.add(cached, {**labels, a.KIND: "cached"})
        self._tokens.add(context - cached, {**labels, a.KIND: "computed"})
        self._cached.record(cached / max(context, 1), self._model)

    def released(self, tenant: str, tokens: int, after_s: float | None) -> None:
        """Output tokens may be sent; ``after_s``: since those before, None for the first ones."""
        if not self._on:  # often called
            return
        labels = {**self._model, **self._tenants.label(tenant), a.KIND: "output"}
        self._tokens.add(tokens, labels)
        if after_s is not None:
            self._between.record(after_s / tokens, self._model)

    def turn_ended(self, tenant: str, status: str, reason: str, s_per_token: float | None) -> None:
        labels = {**self._model, **self._tenants.label(tenant)}
        self._turns.add(1, {**labels, a.STATUS: status, a.CAUSE: reason})
        if s_per_token is not None:
            self._per_token.record(s_per_token, self._chat)

    def pulled(self, received: int) -> None:
        self._pulled.add(received)

    def committed(self, appends: int, seconds: float) -> None:
        """One group commit was answered."""
        self._commit.record(seconds)
        self._appends.record(appends)

    def appended(self, tokens: int) -> None:
        self._written.add(4 * tokens)

    def fenced(self, write: str) -> None:
        self._fenced.add(1, {a.WRITE: write})

    def repaired(self) -> None:
        self._repairs.add(1)

    def load(
        self,
        *,
        running: int,
        queued: int,
        pages: Mapping[str, int],
        pinned_pages: int,
        sessions: int,
        ledger_bytes: int,
    ) -> None:
        """What gauges show until the next call."""
        self._pages = dict(pages)
        self._gauges = {
            "sessile.turns.running": running,
            "sessile.turns.queued": queued,
            "sessile.kv.pinned": pinned_pages,
            "sessile.sessions.held": sessions,
            "sessile.ledger.held": ledger_bytes,
        }


class _Maker:
    """Instruments as the table has them."""

    def __init__(self, meter: Meter | None, table: Mapping[str, Instrument]) -> None:
        self._meter = meter or metrics.NoOpMeter("sessile")
        self._table = table

    def counter(self, name: str) -> metrics.Counter:
        one = self._of(name, "counter")
        counter = self._meter.create_counter(name, one.unit, one.description)
        if not one.attributes:
            counter.add(0)  # there from the start, so that the first event is an increase
        return counter

    def histogram(self, name: str) -> metrics.Histogram:
        one = self._of(name, "histogram")
        return self._meter.create_histogram(name, one.unit, one.description)

    def gauge(
        self, name: str, values: Callable[[], Mapping[str, int]], attribute: str = ""
    ) -> None:
        """``values``: by the attribute's value; without an attribute, of one empty one."""
        one = self._of(name, "gauge")

        def observe(_: CallbackOptions) -> list[Observation]:
            return [
                Observation(value, {attribute: key} if attribute else {})
                for key, value in values().items()
            ]

        self._meter.create_observable_gauge(name, [observe], one.unit, one.description)

    def _of(self, name: str, kind: Kind) -> Instrument:
        one = self._table[name]
        assert one.kind == kind, f"{name} is a {one.kind}"
        return one
