"""What is said of one run of a turn: its spans, and what it adds to the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from opentelemetry.trace import SpanKind

from gateway.telemetry import attributes as a
from gateway.telemetry.logs import about
from gateway.telemetry.tracing import NO_SPANS, Spans
from statestore.records import FinishReason, TurnResult
from workers.turn.ending import Broken, Ended, Ending
from workers.turn.generation import FirstOutput
from workers.turn.opening import Opened
from workers.turn.ports import TurnPorts


@dataclass(slots=True)
class _Commits:
    """Group commits of the run, together: one span for all of them."""

    began_at: float = 0.0
    ended_at: float = 0.0
    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0


class RunReport:
    """Of one run, by its task. Decides nothing."""

    def __init__(self, ports: TurnPorts, tenant: str, session_id: str, turn_id: str) -> None:
        self._ports = ports
        self._tracing = ports.tracing
        self._metrics = ports.metrics
        self._tenant = tenant
        self._session_id = session_id
        self._turn_id = turn_id
        self._span: Spans = NO_SPANS
        self._commits = _Commits()
        self._decoding_since: float | None = None
        self._first_release_at = 0.0
        self._last_release_at: float | None = None
        self._released = 0

    @contextmanager
    def of_run(self, traceparent: str) -> Iterator[None]:
        """Around the whole run. ``traceparent``: of the turn, if it was accepted before."""
        says = {
            **a.CHAT,
            a.MODEL: self._ports.engine.info.model,
            a.TURN: self._turn_id,
            a.TENANT: self._tenant,
            a.REPLICA: str(self._ports.ref),
        }
        span = self._tracing.resumed_span(
            "run turn", self._session_id, traceparent, says, SpanKind.SERVER
        )
        with about(self._session_id, self._turn_id), span as self._span:
            yield

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around the opening: reads of the store, rendering, the turn's begin in the ledger."""
        with self._tracing.span("open", self._session_id, {a.TURN: self._turn_id}):
            yield

    def opened(self, opened: Opened) -> None:
        sampling, rules = opened.plan.sampling, opened.plan.rules
        self._span.set(
            {
                a.ATTEMPT: opened.turn.attempt,
                a.INPUT_TOKENS: opened.turn.output_start.length,
                a.TEMPERATURE: sampling.temperature,
                a.MAX_TOKENS: rules.max_tokens,
                "sessile.resumed_tokens": len(opened.output.tokens),
            }
        )

    def first_output(self, first: FirstOutput) -> None:
        """A generation has computed its context: its wait and its prefill are over."""
        now = anyio.current_time()
        queued_s = first.queue_s or 0.0
        if first.queue_s is not None:
            self._past("queue", now - first.submitted_at, queued_s, {})
        self._past(
            "prefill",
            now - first.submitted_at - queued_s,
            first.came_at - first.submitted_at - queued_s,
            {
                a.INPUT_TOKENS: first.context_tokens,
                a.CACHED_TOKENS: first.cached_tokens,
                "sessile.computed_tokens": first.context_tokens - first.cached_tokens,
                "sessile.queue_included": first.queue_s is None,
            },
        )
        self._metrics.prompt(self._tenant, first.cached_tokens, first.context_tokens)
        if self._decoding_since is None:
            self._decoding_since = first.came_at

    def committed(self, began_at: float) -> None:
        """A group commit with this turn was answered, whatever the answer."""
        now, commits = anyio.current_time(), self._commits
        commits.began_at = commits.began_at or began_at
        commits.ended_at = now
        commits.count += 1
        commits.total_s += now - began_at
        commits.longest_s = max(commits.longest_s, now - began_at)

    def released(self, tokens: int) -> None:
        """So many more output tokens are in the ledger and may be sent."""
        if not tokens:
            return
        now, before = anyio.current_time(), self._last_release_at
        self._metrics.appended(tokens)
        self._metrics.released(self._tenant, tokens, None if before is None else now - before)
        self._released += tokens
        self._last_release_at = now
        if before is None:
            self._first_release_at = now

    def ended(self, ending: Ending | None, result: TurnResult | None) -> None:
        """``result``: what this run has ended the turn with in the ledger."""
        now, commits = anyio.current_time(), self._commits
        if self._decoding_since is not None:
            lasted_s = (self._last_release_at or now) - self._decoding_since
            says = {a.OUTPUT_TOKENS: self._released, "sessile.s_per_token": self._s_per_token()}
            self._past("decode", now - self._decoding_since, lasted_s, says)
        if commits.count:
            self._past(
                "group commit",
                now - commits.began_at,
                commits.ended_at - commits.began_at,
                {
                    "sessile.commits": commits.count,
                    "sessile.commits.total_ms": round(commits.total_s * 1000, 3),
                    "sessile.commits.max_ms": round(commits.longest_s * 1000, 3),
                },
            )
        self._span.set({a.OUTCOME: type(ending).__name__.lower(), a.OUTPUT_TOKENS: self._released})
        if isinstance(ending, Broken):
            self._span.fail(ending.error)
        elif isinstance(ending, Ended) and ending.turn.result is not None:
            self._describe(ending.turn.result)
        if result is not None:
            s_per_token = self._s_per_token() if self._released > 1 else None
            self._metrics.turn_ended(
                self._tenant, result.status.lower(), str(result.reason), s_per_token
            )

    def _describe(self, result: TurnResult) -> None:
        says = {a.STATUS: result.status.lower(), a.FINISH_REASONS: [str(result.reason)]}
        self._span.set(says)
        if result.reason in (FinishReason.ERROR, FinishReason.DEADLINE):
            self._span.fail(result.error, kind=str(result.reason))

    def _s_per_token(self) -> float:
        """Mean time between tokens of this run; those of the first release came together."""
        if self._last_release_at is None or self._released < 2:
            return 0.0
        return (self._last_release_at - self._first_release_at) / (self._released - 1)

    def _past(self, name: str, ago_s: float, lasted_s: float, says: dict[str, float | int]) -> None:
        self._tracing.past(name, self._session_id, ago_s=ago_s, lasted_s=lasted_s, attributes=says)
