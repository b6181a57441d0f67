"""Checks of what a client asks for that need neither a model nor a session.

The gateway makes them when a session is opened, so that no session exists that can never run a
turn; replicas make the same ones for every turn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from sessile.v1 import types_pb2

from gateway.core.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_BYTES = 256

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PRIORITIES = frozenset(types_pb2.TurnPriority.values())
_ROLES = frozenset(types_pb2.Message.Role.values()) - {types_pb2.Message.ROLE_UNSPECIFIED}


def check_params(params: types_pb2.SamplingParams) -> None:
    """Raises InvalidRequest naming the first parameter out of its range."""
    if not (math.isfinite(params.temperature) and 0.0 <= params.temperature <= 2.0):
        raise InvalidRequest("temperature must be within 0 and 2")
    if params.HasField("top_p") and not 0.0 < params.top_p <= 1.0:
        raise InvalidRequest("top_p must be over 0 and at most 1")
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    if params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        raise InvalidRequest("min_tokens must not be over max_tokens")
    if len(params.stop) > MAX_STOPS or len(params.stop_token_ids) > MAX_STOPS:
        raise InvalidRequest(f"at most {MAX_STOPS} stop strings and {MAX_STOPS} stop_token_ids")
    for stop in params.stop:
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_BYTES} bytes")


def check_priority(priority: types_pb2.TurnPriority.ValueType) -> None:
    """Raises InvalidRequest for a priority that is not known here."""
    if priority not in _PRIORITIES:
        raise InvalidRequest(
            f"priority {priority} is not known: a turn is interactive (1) or batch (2)",
            hint="Set one of these, or none: the turn is interactive then.",
        )


def check_roles(messages: Iterable[types_pb2.Message]) -> None:
    """Raises InvalidRequest for a message whose role is not set or not known."""
    if any(message.role not in _ROLES for message in messages):
        raise InvalidRequest("every message needs a role: system, user, assistant or tool")


def check_leading(messages: Iterable[types_pb2.Message]) -> None:
    """Raises InvalidRequest for a system message that is not the session's first: no template
    renders it, so no turn could ever run."""
    system = types_pb2.Message.ROLE_SYSTEM
    if any(message.role == system for index, message in enumerate(messages) if index):
        raise InvalidRequest(
            "a system message can only be a session's first message",
            hint="Join the instructions into one system message and send it first.",
        )


def check_tools(tools: Iterable[types_pb2.ToolDefinition]) -> None:
    """Raises InvalidRequest for a name that is no name or is given twice, and for parameters that
    are not a JSON object, or nested too deep to be read as one."""
    names: set[str] = set()
    for tool in tools:
        if _TOOL_NAME.fullmatch(tool.name) is None or tool.name in names:
            raise InvalidRequest(
                f"tool {tool.name[:64]!r}: tools have names of their own, out of letters, digits,"
                " '_' and '-', 1 to 64"
            )
        names.add(tool.name)
        try:
            valid = isinstance(json.loads(tool.parameters_json or "{}"), dict)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise InvalidRequest(f"tool {tool.name!r}: parameters_json must be a JSON object")
