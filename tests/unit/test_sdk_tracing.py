"""The client's part of a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sessile import NotFound, Runtime, Sessile
from sessile import tracing as sdk
from sessile.sync import Sessile as SyncSessile
from sessile.v1 import session_pb2

from gateway.core import errors
from gateway.telemetry import attributes
from tests.support.fake_gateway import (
    Cut,
    Fail,
    FakeGateway,
    accepted,
    finished,
    gateway_in_a_thread,
    serving,
    session,
    tokens,
)

pytestmark = pytest.mark.anyio


class Recorder:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("app")

    def named(self, name: str) -> ReadableSpan:
        (found,) = [s for s in self.exporter.get_finished_spans() if s.name == name]
        return found


def header(span: ReadableSpan) -> str:
    assert span.context is not None
    flags = span.context.trace_flags
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{flags:02x}"


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def gateway(anyio_backend: str) -> AsyncIterator[FakeGateway]:
    async with serving() as fake:
        yield fake


@asynccontextmanager
async def client_of(gateway: FakeGateway, recorder: Recorder) -> AsyncIterator[Sessile]:
    async def no_nap(seconds: float) -> None: ...

    runtime = Runtime(sleep=no_nap)
    async with Sessile(gateway.target, tracer_provider=recorder.provider, runtime=runtime) as it:
        yield it


async def test_a_turn_is_one_span_whatever_its_streams_and_every_stream_carries_it(
    gateway: FakeGateway, recorder: Recorder
) -> None:
    gateway.answers.append(session_pb2.OpenSessionResponse(session=session()))
    gateway.turns.append([accepted(), tokens(0), Cut()])
    gateway.turns.append([accepted("r2", 2, attached=True), tokens(2), finished(4)])
    async with client_of(gateway, recorder) as client:
        with recorder.tracer.start_as_current_span("work"):
            opened = await client.open()
            result = await opened.run("hi", turn_id="t1").result()
    assert result.reconnects == 1
    chat, work = recorder.named("chat m"), recorder.named("work")
    assert chat.kind is SpanKind.CLIENT
    assert chat.parent == work.context
    assert gateway.traces == [header(work), header(chat), header(chat)]
    assert dict(chat.attributes or {}) == {
        attributes.OPERATION: "chat",
        attributes.PROVIDER: "sessile",
        attributes.CONVERSATION_ID: "ses_a",
        attributes.SESSION: "ses_a",
        attributes.TURN: "t1",
        attributes.MODEL: "m",
        attributes.STATUS: "committed",
        attributes.FINISH_REASONS: ("stop",),
        attributes.INPUT_TOKENS: 10,
        attributes.CACHED_TOKENS: 4,
        attributes.OUTPUT_TOKENS: 4,
    }
    assert [event.name for event in chat.events] == ["first token", "connected again", "moved"]


async def test_a_turn_that_cannot_be_read_is_a_failed_span(
    gateway: FakeGateway, recorder: Recorder
) -> None:
    gateway.turns.append([Fail(errors.NotFound("no session", reason="SESSION_NOT_FOUND"))])
    async with client_of(gateway, recorder) as client:
        with pytest.raises(NotFound):
            await client.session("ses_a").run("hi").result()
    chat = recorder.named("chat")
    assert chat.status.status_code is StatusCode.ERROR
    assert (chat.attributes or {})["error.type"] == "SESSION_NOT_FOUND"


async def test_an_abandoned_turn_s_span_ends(gateway: FakeGateway, recorder: Recorder) -> None:
    gateway.turns.append([accepted(), tokens(0), finished(2)])
    async with (
        client_of(gateway, recorder) as client,
        client.session("ses_a").run("hi", on_abandon="detach") as turn,
    ):
        await anext(turn)
    assert recorder.named("chat").events[-1].name == "the end was not seen"


async def test_outside_of_a_trace_no_header_is_sent(gateway: FakeGateway) -> None:
    gateway.turns.append([accepted(), tokens(0), finished(2)])
    async with Sessile(gateway.target) as client:
        await client.session("ses_a").run("hi").result()
    assert gateway.traces == [""]


def test_the_synchronous_client_is_in_the_trace_of_the_calling_thread(recorder: Recorder) -> None:
    with gateway_in_a_thread() as gateway:
        gateway.turns.append([accepted(), tokens(0), finished(2)])
        with (
            SyncSessile(gateway.target, tracer_provider=recorder.provider) as client,
            recorder.tracer.start_as_current_span("work"),
        ):
            client.session("ses_a").run("hi").result()
    assert recorder.named("chat").parent == recorder.named("work").context
    assert gateway.traces == [header(recorder.named("chat"))]


def test_without_opentelemetry_the_client_works_and_says_nothing() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from sessile.tracing import AVAILABLE, Tracing\n"
        "from sessile import Sessile\n"
        "assert not AVAILABLE\n"
        "span = Tracing().turn('s', 't', 'm')\n"
        "span.event('x')\n"
        "span.failed('no', 'why')\n"
        "span.end()\n"
        "assert span.headers() == Tracing().headers() == ()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert sdk.AVAILABLE
