"""Finds out what a chat template does, and whether it can be rendered turn by turn.

Done once, when a model is loaded, over a battery of conversations. Templates that re-write earlier
messages when later ones come (the system message moved to the last one, messages numbered or
forgotten) are refused: with those, a ledger that only grows would not hold what the model expects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from workers.text.port import BadMessages, Call, Role, TemplateRefused, Tool
from workers.text.rendering import (
    STUB_REPLY,
    Json,
    Render,
    TemplateShape,
    later_turn,
    template_call,
    template_tool,
)
from workers.text.special_text import SpecialText

_ADVICE = (
    "Give the model's folder a chat_template.jinja in which what was written for earlier messages "
    "does not depend on later ones"
)


def _message(role: Role, content: str, **more: Any) -> Json:
    return {"role": role.value, "content": content, **more}


def _user(content: str) -> Json:
    return _message(Role.USER, content)


def _reply(content: str) -> Json:
    return _message(Role.ASSISTANT, content)


def _calling(arguments_as_text: bool) -> Json:
    return _message(Role.ASSISTANT, "", tool_calls=[template_call(_CALL, arguments_as_text)])


_SYSTEM = _message(Role.SYSTEM, "Sessile's stub system message")
_STUB = (_user("Sessile's stub question"), _reply(STUB_REPLY))
_TOOL = template_tool(Tool("probe_tool", "Looks something up.", '{"type": "object"}'))
_CALL = Call("probecall", "probe_tool", '{"probe_key": "probe_value"}')
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
    system = _is_rendered([_SYSTEM, *_STUB, _user("One")], render, [_SYSTEM["content"]])
    shape = _shape_with((_SYSTEM, *_STUB) if system else _STUB, render, specials)
    shape = replace(shape, system_messages=system)
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
    begin, end = text.find(STUB_REPLY), text.find("probe-next")
    if begin < 0 or end < 0:
        raise TemplateRefused("the chat template leaves out or changes the text of messages")
    begin += len(STUB_REPLY)
    ending = specials.first(text[:end], begin)
    if ending is None:
        raise TemplateRefused(
            "the chat template does not end an assistant's message with a special token"
        )
    header = text[: begin - len(STUB_REPLY)]
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
    for as_text in (False, True):
        history = [_user("One"), _calling(as_text), _user("Two")]
        if _is_rendered(history, render, ["probe_tool", '"probe_key"', '"probe_value"']):
            return replace(shape, tool_calls=True, arguments_as_text=as_text)
    return shape


def _renders_tool_messages(render: Render, shape: TemplateShape) -> bool:
    """Tool results follow a call that the model wrote as text, or one given as a tool call; what
    is appended for them must be the same."""
    replies = [_reply("calling")]
    if shape.tool_calls:
        replies.append(_calling(shape.arguments_as_text))
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
