"""Bad input to every call, as a table: what is sent, the status and the reason that it is answered,
and words that the answer must say."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from tests.support.bad_input import fleet, sessions, turns
from tests.support.bad_input.rows import OTHER_MODEL, ROWS, Code, Row, always, row
from tests.support.bad_input.turns import no_replica_of_its_model
from tests.support.served_world import REQUESTS

TABLES = (sessions, turns, fleet)
"""Where the rows are that are not every call's."""


def way_to_text(kind: Any, path: tuple[FieldDescriptor, ...] = ()) -> tuple[FieldDescriptor, ...]:
    """The way to one text in a message; empty if there is none."""
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            return (*path, field)
    for field in kind.fields:
        if field.message_type is not None and len(path) < 3:
            found = way_to_text(field.message_type, (*path, field))
            if found:
                return found
    return ()


def broken_text(path: tuple[FieldDescriptor, ...]) -> bytes:
    """A message in which that text is not UTF-8."""
    data = b"\xc3\x28"
    for field in reversed(path):
        data = bytes([field.number << 3 | 2, len(data)]) + data
    return data


class Raw:
    """Bytes that go out as they are."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:
        return self.data


for every, request_kind in REQUESTS.items():
    row(every, "bytes that are no message", always(Raw(b"\xff\xff\xff")), "Serialise it")
    way = way_to_text(request_kind.DESCRIPTOR)
    if way:
        row(every, "text that is no UTF-8", always(Raw(broken_text(way))), "valid UTF-8")

__all__ = [
    "OTHER_MODEL",
    "ROWS",
    "TABLES",
    "Code",
    "Row",
    "broken_text",
    "no_replica_of_its_model",
    "way_to_text",
]
