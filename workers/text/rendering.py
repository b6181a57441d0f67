"""Rendering only what is new, by difference, with a template that was probed for it.

A template renders whole conversations, but a session's ledger only grows. What a turn appends is
found by rendering a short stub history followed by the new messages, and cutting after the stub's
last reply: first what closes that reply, then the new messages, then the generation prompt. That is
right if this tail depends on the new messages alone, and if a full render begins with what earlier
turns appended. :func:`probe` checks both over a battery of conversations, once, when a template is
loaded; it also finds what the template does with tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from workers.text.port import BadMessages, ChatMessage, Role, TemplateRefused, Tool
from workers.text.special_text import SpecialText

Json = Mapping[str, Any]
Render = Callable[[Sequence[Json], Sequence[Json] | None], str]
"""Messages and tools (in the form that templates expect) to text, up to and including the
generation prompt; raises BadMessages."""

_ADVICE = (
    "Give the model's folder a chat_template.jinja in which what was written for earlier messages "
    "does not depend on later ones"
)
_REPLY = "Sessile's stub reply"


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """What the probe found."""

    stub: tuple[Json, ...]
    """A history that ends with the reply ``_REPLY``."""
    before_end: str
    """What the template writes between a reply and the end-of-turn token; usually nothing."""
    end_of_turn: str
    """The special token that ends a reply."""
    prompt_opening: str = ""
    """What the generation prompt has beyond a past reply's header (such as ``<think>``)."""
    reply_opening: str = ""
    """White space that a past reply's header has beyond the generation prompt: models whose
    template has it generate it themselves."""
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
    end = text.find(_REPLY) + len(_REPLY)
    closing = shape.before_end + shape.end_of_turn
    if _REPLY not in text or not text.startswith(closing, end):
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


def _template_message(message: ChatMessage, shape: TemplateShape) -> Json:
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
            _call(
                call.id,
                call.name,
                call.arguments
                if shape.arguments_as_text
                else _json_object(call.arguments, f"the arguments of call {call.id!r}"),
            )
            for call in message.tool_calls
        ]
    return rendered


def _json_object(text: str, what: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadMessages(f"{what} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadMessages(f"{what} must be a JSON object")
    return value


def _call(call_id: str, name: str, arguments: Json | str) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _message(role: Role, content: str, **more: Any) -> Json:
    return {"role": role.value, "content": content, **more}


def _user(content: str) -> Json:
    return _message(Role.USER, content)


def _reply(content: str) -> Json:
    return _message(Role.ASSISTANT, content)


# --- The probe ---------------------------------------------------------------------------------

_SYSTEM = _message(Role.SYSTEM, "Sessile's stub system message")
_STUB = (_user("Sessile's stub question"), _reply(_REPLY))
_TOOL = template_tool(Tool("probe_tool", "Looks something up.", '{"type": "object"}'))
_RESULT = _message(Role.TOOL, "probe-result", tool_call_id="probecall", name="probe_tool")
_RESULTS = ([_RESULT], [_RESULT, _RESULT], [_RESULT, _user("Well?")])

Conversation = Sequence[Sequence[Json]]
"""The new messages of each turn; the replies between them are made up."""

_BASIC: Conversation = (
    [_user("One")],
    [_user("Two")],
    [_user("Three")],
    [_user("4")],
    [_user("5")],
)
_MORE: tuple[Conversation, ...] = (
    ([_message(Role.SYSTEM, "Be brief."), _user("One")], [_user("Two")], [_user("Three")]),
    ([_message(Role.SYSTEM, ""), _user("")], [_user("")], [_user("Now?")]),
    ([_user("Grüße, 世界 👋🏽")], [_user("  two\n\nlines \n")], [_user('{"a": [1, "<b>"]}')]),
    ([_user("a"), _user("b")], [_user("c"), _user("d")], [_user("e")]),
    ([_message(Role.SYSTEM, "S"), _reply("Hi!"), _user("One")], [_user("Two")]),
)


def probe(render: Render, specials: SpecialText) -> TemplateShape:
    """Finds how the template closes a reply and what it does with tools.

    Raises TemplateRefused if conversations cannot be rendered turn by turn. Of the stub histories
    the one with a system message is tried first: some templates write a default one without it.
    """
    with_system = _is_rendered([_SYSTEM, *_STUB, _user("One")], render)
    shape = _shape_with((_SYSTEM, *_STUB) if with_system else _STUB, render, specials)
    _require(_BASIC, render, shape, None)
    for conversation in _MORE:
        if _is_rendered(_flatten(conversation), render):
            _require(conversation, render, shape, None)
    shape = replace(shape, tools=_renders_tools(render, shape))
    shape = _with_tool_calls(render, shape)
    return replace(shape, tool_messages=_renders_tool_messages(render, shape))


def _shape_with(stub: tuple[Json, ...], render: Render, specials: SpecialText) -> TemplateShape:
    try:
        text, prompt = render([*stub, _user("probe-next")], None), render(stub[:-1], None)
    except BadMessages as error:
        raise TemplateRefused(f"cannot render a plain conversation: {error}") from error
    begin, end = text.find(_REPLY), text.find("probe-next")
    if begin < 0 or end < 0:
        raise TemplateRefused("the chat template leaves out or changes the text of messages")
    begin += len(_REPLY)
    ending = specials.first(text[:end], begin)
    if ending is None:
        raise TemplateRefused(
            "the chat template does not end an assistant's message with a special token"
        )
    header = text[: begin - len(_REPLY)]
    reply_opening = header.removeprefix(prompt) if header.startswith(prompt) else ""
    if not prompt.startswith(header) and not reply_opening.isspace():
        raise TemplateRefused(
            "what the chat template writes before a reply is not what it wrote when it asked for "
            f"that reply: {_difference(prompt, header)}. {_ADVICE}"
        )
    return TemplateShape(
        stub=stub,
        before_end=text[begin : ending.start()],
        end_of_turn=ending[0],
        prompt_opening=prompt[len(header) :],
        reply_opening=reply_opening,
    )


def _require(
    conversation: Conversation, render: Render, shape: TemplateShape, tools: Sequence[Json] | None
) -> None:
    """Raises TemplateRefused unless the turns, one after another, give the full render."""
    history: list[Json] = []
    past = ""
    for index, new in enumerate(conversation):
        history += new
        try:
            full = render(history, tools)
            text = later_turn(render, shape, new) if index else full
        except BadMessages as error:
            raise TemplateRefused(f"cannot render a plain conversation: {error}") from error
        if full != past + text:
            raise TemplateRefused(
                f"the chat template cannot be rendered turn by turn: in turn {index + 1} the "
                f"ledger and a full render differ: {_difference(past + text, full)}. {_ADVICE}"
            )
        past += text.removesuffix(shape.prompt_opening)
        past += f"{shape.reply_opening}reply {index}{shape.before_end}{shape.end_of_turn}"
        history.append(_reply(f"reply {index}"))


def _renders_tools(render: Render, shape: TemplateShape) -> bool:
    if not _is_rendered([_user("One")], render, ["probe_tool"], [_TOOL]):
        return False
    try:
        _require(_BASIC[:3], render, shape, [_TOOL])
    except TemplateRefused:
        return False  # written anew beside the last message: an append-only ledger cannot
    return True


def _with_tool_calls(render: Render, shape: TemplateShape) -> TemplateShape:
    """Whether, and in which form, calls in an assistant's message are rendered as JSON."""
    for arguments in ({"probe_key": "probe_value"}, '{"probe_key": "probe_value"}'):
        call = _call("probecall", "probe_tool", arguments)
        history = [_user("One"), _message(Role.ASSISTANT, "", tool_calls=[call])]
        wanted = ["probe_tool", '"probe_key"', '"probe_value"']
        if _is_rendered([*history, _user("Two")], render, wanted):
            return replace(shape, tool_calls=True, arguments_as_text=isinstance(arguments, str))
    return shape


def _renders_tool_messages(render: Render, shape: TemplateShape) -> bool:
    """Tool results follow a call that the model wrote as text, or one given as a tool call; what
    is appended for them must be the same."""
    replies = [_reply("calling")]
    if shape.tool_calls:
        arguments = '{"a": 1}' if shape.arguments_as_text else {"a": 1}
        call = _call("probecall", "probe_tool", arguments)
        replies.append(_message(Role.ASSISTANT, "", tool_calls=[call]))
    for results in _RESULTS:
        try:
            text = shape.end_of_turn + later_turn(render, shape, results)
            full = [render([_user("One"), reply, *results], None) for reply in replies]
        except BadMessages:
            return False
        if "probe-result" not in text or not all(it.endswith(text) for it in full):
            return False
    return True


def _difference(grown: str, full: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(grown, full, strict=False))
    at = sum(1 for _ in same)
    return f"after {grown[max(0, at - 30) : at]!r}, {grown[at:][:30]!r} or {full[at:][:30]!r}"


def _is_rendered(
    messages: Sequence[Json],
    render: Render,
    wanted: Iterable[str] = (),
    tools: Sequence[Json] | None = None,
) -> bool:
    try:
        text = render(messages, tools)
    except BadMessages:
        return False
    return all(part in text for part in wanted)


def _flatten(conversation: Conversation) -> list[Json]:
    history: list[Json] = []
    for new in conversation:
        history += [*new, _reply("reply")]
    return history[:-1]
