"""Log records as text or as JSON, with the session, turn and trace that they are about.

Whoever works on a turn says so once with :func:`about`; the ids then are on every record that is
written meanwhile, also by libraries.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from opentelemetry import trace

from gateway.telemetry.config import LogFormat

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_about: ContextVar[tuple[str, str]] = ContextVar("about", default=("", ""))


@contextmanager
def about(session_id: str, turn_id: str = "") -> Iterator[None]:
    """Records written within the block, and by tasks started in it, are about this."""
    token = _about.set((session_id, turn_id))
    try:
        yield
    finally:
        _about.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Fields: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``,
    those of ``identity``, and where there are any ``session_id``, ``turn_id``, ``trace_id``,
    ``span_id``, ``exception``."""

    def __init__(self, identity: Mapping[str, str]) -> None:
        super().__init__()
        self._identity = dict(identity)

    def format(self, record: logging.LogRecord) -> str:
        written = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, str] = {
            "time": written.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._identity,
        }
        session_id, turn_id = _about.get()
        if session_id:
            fields["session_id"] = session_id
        if turn_id:
            fields["turn_id"] = turn_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields["trace_id"] = trace.format_trace_id(span.trace_id)
            fields["span_id"] = trace.format_span_id(span.span_id)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(fields, ensure_ascii=False)


def log_to(
    level: str, log_format: LogFormat, identity: Mapping[str, str], stream: TextIO | None = None
) -> None:
    """Sends this process's records to ``stream`` (standard error unless given). ``identity`` names
    the process on each of them."""
    stream = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(identity) if as_json else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
