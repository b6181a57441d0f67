"""What is said in a session: messages, tools, how output is chosen and how soon.

session.run([Message.user("What is 6 * 7?"), ...], max_tokens=64)
session.run(Message.tool(call, "42"))
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sessile.v1 import types_pb2 as pb


class Role(enum.StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Priority(enum.StrEnum):
    """Which turns go first where there is not room for all."""

    INTERACTIVE = "interactive"
    """Somebody waits for it."""
    BATCH = "batch"
    """Nobody does: it waits behind interactive turns, and is refused as Overloaded earlier."""

    def to_pb(self) -> pb.TurnPriority.ValueType:
        return pb.TurnPriority.Value(f"TURN_PRIORITY_{self.name}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call asked for by the model."""

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, parsed. Raises ValueError if the model wrote no JSON object."""
        value = json.loads(self.arguments_json)
        if not isinstance(value, dict):
            raise ValueError(f"arguments of {self.name} are no JSON object")
        return value

    def to_pb(self) -> pb.ToolCall:
        return pb.ToolCall(id=self.id, name=self.name, arguments_json=self.arguments_json)

    @classmethod
    def from_pb(cls, call: pb.ToolCall) -> ToolCall:
        return cls(call.id, call.name, call.arguments_json)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})

    def to_pb(self) -> pb.ToolDefinition:
        return pb.ToolDefinition(
            name=self.name,
            description=self.description,
            parameters_json=json.dumps(self.parameters, sort_keys=True, ensure_ascii=False),
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Its text is never parsed for special tokens."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @classmethod
    def system(cls, content: str) -> Message:
        """Instructions; allowed only among a session's leading messages."""
        return cls(Role.SYSTEM, content)

    @classmethod
    def user(cls, content: str) -> Message:
        """What the user says."""
        return cls(Role.USER, content)

    @classmethod
    def assistant(cls, content: str, tool_calls: Sequence[ToolCall] = ()) -> Message:
        """History that was generated elsewhere."""
        return cls(Role.ASSISTANT, content, tuple(tool_calls))

    @classmethod
    def tool(cls, call: ToolCall | str, result: object) -> Message:
        """The result of a tool call (the call, or its id). What is no string becomes JSON."""
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        if isinstance(call, ToolCall):
            return cls(Role.TOOL, text, tool_call_id=call.id, name=call.name)
        return cls(Role.TOOL, text, tool_call_id=call)

    def to_pb(self) -> pb.Message:
        return pb.Message(
            role=pb.Message.Role.Value(f"ROLE_{self.role.name}"),
            content=self.content,
            tool_calls=[call.to_pb() for call in self.tool_calls],
            tool_call_id=self.tool_call_id,
            name=self.name,
        )

    @classmethod
    def from_pb(cls, message: pb.Message) -> Message:
        return cls(
            role=Role[pb.Message.Role.Name(message.role).removeprefix("ROLE_")],
            content=message.content,
            tool_calls=tuple(ToolCall.from_pb(call) for call in message.tool_calls),
            tool_call_id=message.tool_call_id,
            name=message.name,
        )


Input = str | Message | Sequence[Message]
"""What a turn is given; a string is one user message."""


def messages_to_pb(value: Input) -> list[pb.Message]:
    """The input as messages of the wire; raises TypeError for anything else."""
    if isinstance(value, str):
        return [Message.user(value).to_pb()]
    messages = [value] if isinstance(value, Message) else list(value)
    for message in messages:
        if not isinstance(message, Message):
            raise TypeError(f"a message is a sessile.Message, not {type(message).__name__}")
    return [message.to_pb() for message in messages]


class Sampling(TypedDict, total=False):
    """How output is chosen and when it stops. What is left out takes the session's default, then
    the model's."""

    temperature: float
    """0 picks the most likely token; at most 2. Default 0."""
    top_p: float
    """0 < top_p <= 1. Default 1."""
    top_k: int
    """0 keeps all. Default 0."""
    seed: int
    """Left out: drawn once when the turn is accepted, then stored."""
    max_tokens: int
    min_tokens: int
    """No stop condition is obeyed before this many output tokens."""
    stop: Sequence[str]
    """The text ends before the first occurrence of one of these (16 at most)."""
    stop_token_ids: Sequence[int]
    ignore_eos: bool


def sampling_to_pb(sampling: Sampling) -> pb.SamplingParams | None:
    """None if nothing is set; raises TypeError for an unknown name."""
    if not sampling:
        return None
    unknown = set(sampling) - set(Sampling.__annotations__)
    if unknown:
        raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
    if isinstance(sampling.get("stop"), str):
        raise TypeError("stop is a list of strings")
    return pb.SamplingParams(**sampling)
