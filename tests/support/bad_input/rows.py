"""Rows of the table of bad input, and what their requests are made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from sessile.v1 import session_pb2
from sessile.v1 import types_pb2 as pb

from tests.support.situations import ABOUT, Case

Code = grpc.StatusCode
OTHER_MODEL = "another"
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """``build`` makes the request; what a call must answer, and words that it must say."""

    method: str
    name: str
    build: Callable[[Case], Message]
    code: grpc.StatusCode
    reason: str
    says: str
    arrange: Callable[[Case], Awaitable[None]] | None = None
    """What happens to the session before."""

    @property
    def id(self) -> str:
        return f"{self.method}: {self.name}"


ROWS: list[Row] = []


def row(
    method: str,
    name: str,
    build: Callable[[Case], Message],
    says: str,
    code: grpc.StatusCode = Code.INVALID_ARGUMENT,
    reason: str = "INVALID_REQUEST",
    arrange: Callable[[Case], Awaitable[None]] | None = None,
) -> None:
    ROWS.append(Row(method, name, build, code, reason, says, arrange))


def always(message: Any) -> Callable[[Case], Any]:
    """That message, whatever the case."""
    return lambda _: message


def changed(method: str, **fields: Any) -> Callable[[Case], Message]:
    """The good request of a method about a session, with other fields."""

    def build(case: Case) -> Message:
        request = ABOUT[method](case)
        request.MergeFrom(type(request)(**fields))
        return request

    return build


def opening(**fields: Any) -> Callable[[Case], Message]:
    def build(case: Case) -> Message:
        known = {"request_id": f"new {case.session_id}", "model": "sim"}
        return session_pb2.OpenSessionRequest(**{**known, **fields})

    return build


def message(role: int, content: str = "x", **fields: Any) -> pb.Message:
    return pb.Message(role=role, content=content, **fields)  # type: ignore[arg-type]


SYSTEM, USER = pb.Message.ROLE_SYSTEM, pb.Message.ROLE_USER
LONG = "x" * 129


PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature not a number": ({"temperature": NAN}, "temperature must be within 0 and 2"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature must be within 0 and 2"),
    "temperature below 0": ({"temperature": -0.1}, "temperature must be within 0 and 2"),
    "temperature over 2": ({"temperature": 2.1}, "temperature must be within 0 and 2"),
    "top_p 0": ({"top_p": 0.0}, "top_p must be over 0 and at most 1"),
    "top_p not a number": ({"top_p": NAN}, "top_p must be over 0 and at most 1"),
    "top_p over 1": ({"top_p": 1.5}, "top_p must be over 0 and at most 1"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens must be at least 1"),
    "min over max": ({"max_tokens": 2, "min_tokens": 3}, "min_tokens must not be over max_tokens"),
    "17 stops": ({"stop": ["s"] * 17}, "at most 16 stop strings"),
    "17 stop ids": ({"stop_token_ids": [1] * 17}, "at most 16 stop strings and 16 stop_token_ids"),
    "an empty stop": ({"stop": [""]}, "a stop string must have 1 to 256 bytes"),
    "a stop too long": ({"stop": ["é" * 129]}, "a stop string must have 1 to 256 bytes"),
}
"""Sampling parameters, of a session or of a turn, and what is said of them."""


def beyond(case: Case, by: int, digest: bytes = b"") -> pb.Position:
    return pb.Position(length=case.head().length + by, digest=digest)
