"""Rendering only what is new, by difference, with a template that was probed for it.

A template renders whole conversations, but a session's ledger only grows. What a turn appends is
found by rendering a short stub history followed by the new messages, and cutting after the stub's
last reply: first what closes that reply, then the new messages, then the generation prompt. That is
right if this tail depends on the new messages alone, and if a full render begins with what earlier
turns appended, which ``template_probe`` checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.text.port import BadMessages, Call, ChatMessage, Role, Tool

Json = Mapping[str, Any]
Render = Callable[[Sequence[Json], Sequence[Json] | None], str]
"""Messages and tools (in the form that templates expect) to text, up to and including the
generation prompt; raises BadMessages."""

STUB_REPLY = "Sessile's stub reply"


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """What a template does, as far as rendering by difference has to know."""

    stub: tuple[Json, ...]
    """A history that ends with the reply ``STUB_REPLY``."""
    before_end: str
    """What the template writes between a reply and the end-of-turn token; usually nothing."""
    end_of_turn: str
    """The special token that ends a reply."""
    prompt_opening: str = ""
    """What the generation prompt has beyond a past reply's header (such as ``<think>``)."""
    reply_opening: str = ""
    """White space that a past reply's header has beyond the generation prompt: models whose
    template has it generate it themselves."""
    system_messages: bool = False
    """A system message is rendered."""
    tools: bool = False
    """Definitions of tools are rendered (with the first turn)."""
    tool_messages: bool = False
    """Messages of the role ``tool`` are rendered."""
    tool_calls: bool = False
    """Calls in a given assistant message are rendered."""
    arguments_as_text: bool = False
    """The template expects a call's arguments as JSON text, not as an object."""


def later_turn(render: Render, shape: TemplateShape, messages: Sequence[Json]) -> str:
    """What follows the end-of-turn token of the last reply: the new messages and the generation
    prompt. Raises BadMessages."""
    text = render([*shape.stub, *messages], None)
    end = text.find(STUB_REPLY) + len(STUB_REPLY)
    closing = shape.before_end + shape.end_of_turn
    if STUB_REPLY not in text or not text.startswith(closing, end):
        raise BadMessages(
            "the model's chat template does not end a reply that is followed by such messages"
        )
    return text[end + len(closing) :]


def template_messages(messages: Sequence[ChatMessage], shape: TemplateShape) -> list[Json]:
    """In the form that templates expect. Raises BadMessages for what this one would drop."""
    return [_template_message(message, shape) for message in messages]


def template_tool(tool: Tool) -> Json:
    """In the form that templates expect. Raises BadMessages if the parameters are no object."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": _json_object(tool.parameters, f"the parameters of tool {tool.name!r}"),
        },
    }


def template_call(call: Call, arguments_as_text: bool) -> Json:
    """In the form that templates expect. Raises BadMessages if the arguments are no object."""
    arguments = _json_object(call.arguments, f"the arguments of call {call.id!r}")
    function = {"name": call.name, "arguments": call.arguments if arguments_as_text else arguments}
    return {"id": call.id, "type": "function", "function": function}


def _template_message(message: ChatMessage, shape: TemplateShape) -> Json:
    if message.role is Role.SYSTEM and not shape.system_messages:
        raise BadMessages(
            "the model's chat template has no system messages; write it into the first user message"
        )
    if message.role is Role.TOOL and not shape.tool_messages:
        raise BadMessages(
            "the model's chat template cannot render tool messages; send the result as the user"
        )
    rendered: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.name:
        rendered["name"] = message.name
    if message.tool_call_id:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if not shape.tool_calls:
            raise BadMessages(
                "the model's chat template drops tool calls; write them into the message's text"
            )
        rendered["tool_calls"] = [
            template_call(call, shape.arguments_as_text) for call in message.tool_calls
        ]
    return rendered


def _json_object(text: str, what: str) -> Json:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadMessages(f"{what} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadMessages(f"{what} must be a JSON object")
    return value
