"""Tool calls in a model's output text.

The text decides alone, and nothing is guessed: what is not a whole, well-formed call is no call.
Two families of formats are known, told apart by the model's chat template:

* Hermes, also Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, any number
  of them among other text;
* Llama 3: the whole answer, or what follows ``<|python_tag|>``, is one object
  ``{"name": …, "parameters": {…}}`` or several of them separated by ``;``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from workers.text.port import Call

ToolCallParser = Callable[[str, str], tuple[Call, ...]]
"""(text, turn id) to calls, whose ids are made of the turn's id and the call's index."""


def parser_for(template: str) -> ToolCallParser | None:
    """The parser of the format that a chat template teaches; None if it is not a known one."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return _after_reasoning(parse_hermes) if "</think>" in template else parse_hermes
    if "<|start_header_id|>" in template and "parameters" in template:
        return parse_llama3
    return None


def parse_hermes(text: str, turn_id: str) -> tuple[Call, ...]:
    """A block that is no call is skipped; the last one may lack its end tag, as when the model
    ends its turn instead of writing it."""
    calls: list[tuple[str, str]] = []
    position = 0
    while (begin := text.find("<tool_call>", position)) >= 0:
        position = begin + len("<tool_call>")
        parsed = _object_at(text, position)
        if parsed is None:
            continue
        value, end = parsed
        call = _call(value, "arguments")
        if call and _HERMES_END.match(text, end):
            calls.append(call)
            position = end
    return _numbered(calls, turn_id)


def parse_llama3(text: str, turn_id: str) -> tuple[Call, ...]:
    """Without the tag there are no marks round a call, so the whole text has to be calls."""
    _, tag, after = text.partition("<|python_tag|>")
    calls: list[tuple[str, str]] = []
    for value in _objects(after if tag else text):
        call = value and (_call(value, "parameters") or _call(value, "arguments"))
        if not call:
            return ()
        calls.append(call)
    return _numbered(calls, turn_id)


def _after_reasoning(parse: ToolCallParser) -> ToolCallParser:
    """A call that a model only thinks about is no call."""

    def parse_answer(text: str, turn_id: str) -> tuple[Call, ...]:
        reasoning, end, answer = text.partition("</think>")
        if not end:
            answer = "" if reasoning.lstrip().startswith("<think>") else reasoning
        return parse(answer, turn_id)

    return parse_answer


def _numbered(calls: list[tuple[str, str]], turn_id: str) -> tuple[Call, ...]:
    return tuple(
        Call(f"call_{turn_id}_{index}", name, arguments)
        for index, (name, arguments) in enumerate(calls)
    )


def _call(value: Mapping[str, Any], arguments_key: str) -> tuple[str, str] | None:
    name, arguments = value.get("name"), value.get(arguments_key)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        (name + text).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no wire can carry
        return None
    return name, text


def _objects(text: str) -> Iterator[dict[str, Any] | None]:
    """The JSON objects that ``text`` consists of, and None where it is anything else."""
    position = 0
    while position < len(text.rstrip()):
        parsed = _object_at(text, position)
        if parsed is None:
            yield None
            return
        value, position = parsed
        yield value
        if separator := _SEPARATOR.match(text, position):
            position = separator.end()


def _object_at(text: str, position: int) -> tuple[dict[str, Any], int] | None:
    """A JSON object at ``position``, after white space, and where it ends."""
    begin = _OBJECT.match(text, position)
    if begin is None:
        return None
    try:
        value, end = _DECODER.raw_decode(text, begin.end() - 1)
    except (ValueError, RecursionError):
        return None
    return value, end


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_OBJECT = re.compile(r"\s*\{")
_SEPARATOR = re.compile(r"\s*;")
_HERMES_END = re.compile(r"\s*(</tool_call>|\Z)")
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
