"""Log records as JSON, with what they are about."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider

from gateway.telemetry.config import LogFormat
from gateway.telemetry.logs import JsonFormatter, about, log_to

pytestmark = pytest.mark.anyio


class Written:
    """A logger whose records are read back."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(JsonFormatter({"gateway": "g1"}))
        self.log = logging.Logger("sessile.test")
        self.log.addHandler(handler)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


def test_a_record_says_who_wrote_it_and_when() -> None:
    written = Written()
    written.log.warning("%s of %s", 1, "größe\nzwei")
    (record,) = written.records
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "WARNING",
        "logger": "sessile.test",
        "message": "1 of größe\nzwei",
        "gateway": "g1",
    }


async def test_it_has_the_ids_of_what_it_is_about_also_in_tasks_and_not_in_others() -> None:
    written = Written()

    async def task(text: str) -> None:
        written.log.info(text)

    async with anyio.create_task_group() as tasks:
        with about("ses_a", "t1"):
            tasks.start_soon(task, "inside")
        tasks.start_soon(task, "outside")
    found = {record["message"]: record for record in written.records}
    assert (found["inside"]["session_id"], found["inside"]["turn_id"]) == ("ses_a", "t1")
    assert "session_id" not in found["outside"]


def test_it_has_the_ids_of_the_current_span() -> None:
    written = Written()
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    with tracer.start_as_current_span("turn") as span:
        written.log.info("within")
    context = span.get_span_context()
    (record,) = written.records
    assert record["trace_id"] == f"{context.trace_id:032x}"
    assert record["span_id"] == f"{context.span_id:016x}"


def test_an_exception_stays_on_one_line() -> None:
    written = Written()
    try:
        raise ValueError("no")
    except ValueError:
        written.log.exception("it failed")
    (record,) = written.records
    assert "ValueError: no" in record["exception"]
    assert "Traceback" in record["exception"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _root() -> Iterator[None]:
    """The process's own handlers are put back."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    root.handlers[:] = kept
    root.setLevel(level)


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize(
    ("log_format", "stream", "as_json"),
    [
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("text", io.StringIO(), False),
        ("json", Terminal(), True),
    ],
)
def test_text_is_for_terminals_unless_it_is_chosen(
    log_format: LogFormat, stream: io.StringIO, as_json: bool
) -> None:
    log_to("info", log_format, {}, stream)
    logging.getLogger("sessile.test").info("hello")
    assert stream.getvalue().startswith("{") == as_json
    assert "hello" in stream.getvalue()
