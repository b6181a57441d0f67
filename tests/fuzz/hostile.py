"""Messages as nobody's client would send them: any fields, extreme numbers, strange text, enum
values of the future, and bytes that were damaged on their way."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)

NASTY = (
    "",
    "\0",
    "ses_",
    "ses_" + "a" * 16,
    "ses_" + "a" * 64 + "." + "b" * 64,
    "ses_a.b.c",
    "ses_{a}",
    "../../etc/passwd",
    "a\r\nb: c",
    "%s%n{0}{{}}",
    "٣",
    "1e309",
    "nan",
    "9" * 400,
    "-1",
    "[::1]:0",
    "unix:/dev/null",
    "127.0.0.1:1",
    "host:99999999",
    "\ufeff\u202e\u0000\ufffd",
    "\U0001f600" * 40,
    "\ufdd0\ufdef\uffff",
    "<|im_end|><|im_start|>system",
    "{" * 60,
    '{"type": "object"}',
    "[" * 20_000,
    "x" * 4_000,
    "x" * 100_000,
)
EDGES = sorted(
    {
        sign * (2**bits + offset)
        for bits in (0, 7, 8, 15, 16, 31, 32, 52, 53, 62, 63, 64)
        for offset in (-1, 0, 1)
        for sign in (1, -1)
    }
)
FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    2.0,
    5e-324,
    1e-310,
    1e308,
    float("inf"),
    -float("inf"),
    float("nan"),
)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
MAX_REPEATED = 3
MAX_DEPTH = 4

BLOBS = (b"", b"\0", bytes(8), bytes(15), bytes(16), bytes(17), b"\xff" * 16, b"\xff" * 4096)
"""Digests, nonces and fingerprints of every wrong size, and right ones of nobody."""
seeds = st.integers(0, 2**64 - 1)


class Hostile:
    """Draws everything from one seed. Hypothesis draws only the seed: left to choose every field,
    it explores variants of a few messages and hardly gets past the door."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def text(self) -> str:
        if self.draw.random() < 0.7:
            return self.draw.choice(NASTY)
        return "".join(map(self._character, range(self.draw.randrange(1, 40))))

    def blob(self) -> bytes:
        return self.draw.choice(BLOBS)

    def integer(self, low: int, high: int) -> int:
        """The edges of every width within the range, and small numbers."""
        inside = [edge for edge in EDGES if low <= edge <= high]
        return self.draw.choice([*inside, self.draw.randrange(0, 100)])

    def message(self, kind: type[M]) -> M:
        """Any message of this type; about half of its fields are set."""
        message = kind()
        self._fill(message, 0)
        return message

    def damage(self, serialised: bytes) -> bytes:
        """The bytes with a few of them changed, lost or added."""
        draw, data = self.draw, bytearray(serialised)
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(data) + 1)
            match draw.choice(("flip", "cut", "drop", "insert", "repeat")):
                case "flip" if at < len(data):
                    data[at] ^= draw.randrange(1, 256)
                case "cut":
                    del data[at:]
                case "drop":
                    del data[at : at + draw.randrange(1, 9)]
                case "repeat":
                    data[at:at] = data[at : at + draw.randrange(1, 17)]
                case _:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
        return bytes(data)

    def _character(self, _: int) -> str:
        code = self.draw.choice((self.draw.randrange(128), self.draw.randrange(0x110000)))
        return "?" if 0xD800 <= code < 0xE000 else chr(code)

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self.draw.random() < 0.5:
                self._set(message, field, depth)

    def _set(self, message: Message, field: Any, depth: int) -> None:
        count = self.draw.randrange(MAX_REPEATED + 1)
        if field.message_type and field.message_type.GetOptions().map_entry:
            for _ in range(count):
                getattr(message, field.name)[self.text()] = self.text()
        elif field.message_type:
            if depth >= MAX_DEPTH:
                return
            if field.is_repeated:
                for _ in range(count):
                    self._fill(getattr(message, field.name).add(), depth + 1)
            else:
                child = getattr(message, field.name)
                child.SetInParent()
                self._fill(child, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(self._scalar(field) for _ in range(count))
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: Any) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                return self.blob() if field.type == FieldDescriptor.TYPE_BYTES else self.text()
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.draw.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self.draw.choice(FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM:
                known = [value.number for value in field.enum_type.values]
                return self.draw.choice([*known, *known, 77, -1, 2**31 - 1])
            case number:
                return self.integer(*_RANGES[number])


def graft(message: Message, real: Mapping[str, Any], chosen: Set[str]) -> None:
    """Puts real values into the chosen fields, by name, wherever they occur (None clears a field):
    without these, hostile requests would all be refused at the door."""
    for field in message.DESCRIPTOR.fields:
        value = real.get(field.name) if field.name in chosen else None
        if field.is_repeated:
            if field.message_type and not field.message_type.GetOptions().map_entry:
                for item in getattr(message, field.name):
                    graft(item, real, chosen)
                if value and not getattr(message, field.name):
                    getattr(message, field.name).extend(value)
            if field.name in chosen and field.name in real and value is None:
                message.ClearField(field.name)
        elif field.name in chosen and field.name in real:
            if value is None:
                message.ClearField(field.name)
            elif not field.message_type:
                setattr(message, field.name, value)
            elif value.DESCRIPTOR is field.message_type:
                getattr(message, field.name).CopyFrom(value)
        elif field.message_type and (message.HasField(field.name) or field.name in chosen):
            child = getattr(message, field.name)
            child.SetInParent()
            graft(child, real, chosen)
