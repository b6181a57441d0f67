"""Spans of sessions: which trace they are in, what is linked, what is sampled."""

from __future__ import annotations

import time

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import StatusCode

from gateway.core.errors import Overloaded
from gateway.telemetry.tracing import Tracing, session_context, traceparent

SESSION = "ses_abc"


class World:
    """A tracer of Sessile's and one of a caller's, and what they recorded."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing("test", provider)
        callers = TracerProvider(shutdown_on_exit=False)
        callers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.caller = callers.get_tracer("caller")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


def own_trace(session_id: str = SESSION) -> int:
    return int(session_context(session_id).trace_id)


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


def test_every_process_finds_the_same_trace_for_a_session_and_another_for_another() -> None:
    assert session_context(SESSION) == session_context(SESSION)
    assert session_context(SESSION).trace_id != session_context("ses_abd").trace_id
    assert session_context(SESSION).is_valid


def test_without_a_caller_s_trace_a_span_is_in_the_session_s_and_only_there() -> None:
    world = World()
    with world.tracing.session_span("turn", SESSION), world.tracing.span("place", SESSION):
        pass
    turn, place = world.named("turn")[0], world.named("place")[0]
    assert trace_of(turn) == trace_of(place) == own_trace()
    assert turn.parent == session_context(SESSION)
    assert place.parent == turn.context
    for span in (turn, place):
        assert span.attributes is not None
        assert span.attributes["sessile.session_id"] == SESSION
        assert span.attributes["gen_ai.conversation.id"] == SESSION


def test_a_caller_s_trace_goes_before_and_the_session_s_shows_the_same() -> None:
    world = World()
    with (
        world.caller.start_as_current_span("work") as work,
        world.tracing.session_span("turn", SESSION) as spans,
    ):
        spans.set({"sessile.outcome": "good"})
    first, second = sorted(world.named("turn"), key=lambda span: trace_of(span) == own_trace())
    assert trace_of(first) == work.get_span_context().trace_id
    assert trace_of(second) == own_trace()
    assert first.context is not None
    assert [link.context for link in first.links] == [session_context(SESSION)]
    assert [link.context for link in second.links] == [first.context]
    for span in (first, second):
        assert span.attributes is not None
        assert span.attributes["sessile.outcome"] == "good"


def test_within_the_session_s_trace_nothing_is_written_twice() -> None:
    world = World()
    with world.tracing.session_span("drain", SESSION), world.tracing.session_span("move", SESSION):
        pass
    assert [span.name for span in world.spans] == ["move", "drain"]


def test_a_session_is_sampled_as_a_whole_and_alike_everywhere() -> None:
    one, other = World(0.5), World(0.5)
    sessions = [f"ses_{number}" for number in range(200)]
    for session_id in sessions:
        for world in (one, other):
            for name in ("turn", "suspend"):
                with world.tracing.session_span(name, session_id):
                    pass
    seen = {span.attributes["sessile.session_id"] for span in one.spans if span.attributes}
    assert 60 < len(seen) < 140
    assert len(one.spans) == 2 * len(seen)
    assert sorted(map(trace_of, one.spans)) == sorted(map(trace_of, other.spans))


def test_a_caller_s_decision_goes_before_the_ratio() -> None:
    world = World(0.0)
    with (
        world.caller.start_as_current_span("work"),
        world.tracing.session_span("turn", SESSION),
    ):
        pass
    (turn,) = world.named("turn")
    assert trace_of(turn) != own_trace()


def test_what_goes_on_with_a_turn_stays_in_its_trace() -> None:
    world = World()
    with world.caller.start_as_current_span("work") as work:
        began = traceparent()
    with (
        world.caller.start_as_current_span("operator") as operator,
        world.tracing.resumed_span("run turn", SESSION, began),
    ):
        pass
    (run,) = world.named("run turn")
    assert trace_of(run) == work.get_span_context().trace_id
    assert [link.context for link in run.links] == [operator.get_span_context()]


@pytest.mark.parametrize("text", ["", "nonsense"])
def test_a_turn_without_a_trace_goes_on_in_that_of_its_dispatch(text: str) -> None:
    world = World()
    with (
        world.caller.start_as_current_span("dispatch") as dispatch,
        world.tracing.resumed_span("run turn", SESSION, text),
    ):
        pass
    assert world.named("run turn")[0].parent == dispatch.get_span_context()


def test_only_a_sampled_trace_is_handed_on() -> None:
    assert traceparent() == ""
    world = World(0.0)
    with world.tracing.session_span("turn", SESSION):
        assert traceparent() == ""


def test_a_failure_is_named_by_its_reason_on_both_spans() -> None:
    world = World()
    with (
        world.caller.start_as_current_span("work"),
        pytest.raises(Overloaded),
        world.tracing.session_span("turn", SESSION),
    ):
        raise Overloaded("no place")
    for span in world.named("turn"):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "OVERLOADED"
        assert not span.events


def test_a_gap_has_the_times_that_the_store_gave() -> None:
    world = World()
    with world.caller.start_as_current_span("next turn") as turn:
        world.tracing.gap(SESSION, "tool gap", 1_000, 3_500)
        world.tracing.gap(SESSION, "tool gap", 0, 3_500)
        world.tracing.gap(SESSION, "tool gap", 3_500, 3_500)
    (gap,) = world.named("tool gap")
    assert (gap.start_time, gap.end_time) == (1_000_000_000, 3_500_000_000)
    assert trace_of(gap) == own_trace()
    assert gap.links[0].context == turn.get_span_context()


def test_a_span_of_the_past_ends_when_it_did() -> None:
    world = World()
    with world.tracing.session_span("run turn", SESSION):
        before = time.time_ns()
        world.tracing.past("prefill", SESSION, ago_s=2.0, lasted_s=0.5, attributes={"a": 1})
        after = time.time_ns()
    (prefill,) = world.named("prefill")
    assert prefill.start_time is not None
    assert prefill.end_time is not None
    assert prefill.end_time - prefill.start_time == 500_000_000
    assert before - 2_000_000_000 <= prefill.start_time <= after - 2_000_000_000


def test_without_an_sdk_a_caller_s_context_is_left_as_it_is() -> None:
    off = Tracing("test", trace.NoOpTracerProvider())
    assert not off.on
    caller = World().caller
    with (
        caller.start_as_current_span("work") as work,
        off.session_span("turn", SESSION) as spans,
        off.span("place", SESSION),
    ):
        spans.set({"a": 1})
        spans.fail("no")
        assert not spans.recording
        assert trace.get_current_span() is work
        off.past("x", SESSION, ago_s=1, lasted_s=1)
        off.opened(SESSION, None)
        off.start("y", SESSION).end()
