"""Tool calls in a model's output text.

The text decides alone. A call that is whole is taken as it is; one that is not JSON is taken if it
is written as a Python literal, or lacks nothing but its last braces, as models do now and then (see
``tests/data/tool_calls_recorded.json``). Anything else is no call: no value is ever made up.
Two families of formats are known, told apart by the model's chat template:

* Hermes, also Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, any number
  of them among other text;
* Llama 3: the answer, or what follows ``<|python_tag|>``, begins with an object
  ``{"name": …, "parameters": {…}}`` or several of them, perhaps separated by ``;``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from workers.text.port import Call

ToolCallParser = Callable[[str, str], tuple[Call, ...]]
"""(text, turn id) to calls, whose ids are made of the turn's id and the call's index."""

_BEGIN, _END, _PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
MARKS = frozenset({_BEGIN, _END, _PYTHON_TAG})
"""What marks calls in a text. Some models have special tokens for it, which otherwise give none."""

MAX_BLOCKS = 256
"""Blocks looked at in one text: a model that writes more is going round in circles."""


def parser_for(template: str) -> ToolCallParser | None:
    """The parser of the format that a chat template teaches; None if it is not a known one."""
    if _BEGIN in template and "<function=" not in template and "<arg_key>" not in template:
        return _after_reasoning(parse_hermes) if "</think>" in template else parse_hermes
    if "<|start_header_id|>" in template and "parameters" in template:
        return parse_llama3
    return None


def parse_hermes(text: str, turn_id: str) -> tuple[Call, ...]:
    """A block that is no call is skipped; the last one may lack its end tag, as when the model
    ends its turn instead of writing it."""
    calls: list[_NameAndArguments] = []
    position = 0
    for _ in range(MAX_BLOCKS):
        begin = text.find(_BEGIN, position)
        if begin < 0:
            break
        position = begin + len(_BEGIN)
        found, end = _calls_at(text, position)
        if not (found and _BLOCK_END.match(text, end)):
            # Tags inside strings are beyond mending: the block ends at the first one.
            tags = (text.find(tag, position) for tag in (_BEGIN, _END))
            end = min((at for at in tags if at >= 0), default=len(text))
            found = _mended(text[position:end])
        if found:
            calls += found
            position = end
    return _numbered(calls, turn_id)


def parse_llama3(text: str, turn_id: str) -> tuple[Call, ...]:
    """Without the tag there are no marks round a call, so it has to come before any other text."""
    _, tag, after = text.partition(_PYTHON_TAG)
    answer = after if tag else text
    return _numbered(_calls_at(answer, 0)[0] or _mended(answer), turn_id)


def _after_reasoning(parse: ToolCallParser) -> ToolCallParser:
    """A call that a model only thinks about is no call."""

    def parse_answer(text: str, turn_id: str) -> tuple[Call, ...]:
        reasoning, end, answer = text.partition("</think>")
        if not end:
            answer = "" if reasoning.lstrip().startswith("<think>") else reasoning
        return parse(answer, turn_id)

    return parse_answer


_NameAndArguments = tuple[str, str]


def _numbered(calls: list[_NameAndArguments], turn_id: str) -> tuple[Call, ...]:
    return tuple(
        Call(f"call_{turn_id}_{index}", name, arguments)
        for index, (name, arguments) in enumerate(calls)
    )


def _calls_at(text: str, position: int) -> tuple[list[_NameAndArguments], int]:
    """The calls that follow one another from ``position`` on, and where they end."""
    calls: list[_NameAndArguments] = []
    end = position
    while begin := _OBJECT.match(text, position):
        try:
            value, position = _DECODER.raw_decode(text, begin.end() - 1)
        except (ValueError, RecursionError):
            break
        call = _call(value)
        if call is None:
            break
        calls.append(call)
        end = position
        if separator := _SEPARATOR.match(text, position):
            position = separator.end()
    return calls, end


def _mended(text: str) -> list[_NameAndArguments]:
    """The calls that ``text`` consists of once Python's notation is JSON's and the last braces are
    there; none if anything else is wrong with it."""
    if not _OBJECT.match(text):
        return []
    as_json = _PYTHON.sub(_python_to_json, text.rstrip())
    for missing in ("", "}", "}}"):
        whole = as_json + missing
        calls, end = _calls_at(whole, 0)
        if calls and end == len(whole):
            return calls
    return []


def _python_to_json(token: re.Match[str]) -> str:
    inside = token[2]
    if inside is None:  # a constant, or a string that does not end
        return _CONSTANTS.get(token[0], token[0])
    return f'"{_QUOTE.sub(lambda quote: _QUOTES.get(quote[0], quote[0]), inside)}"'


def _call(value: dict[str, Any]) -> _NameAndArguments | None:
    value = value["function"] if isinstance(value.get("function"), dict) else value
    if "description" in value:
        return None  # a tool's definition, said again
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    try:
        if isinstance(arguments, str):  # JSON inside JSON, as in OpenAI's API
            arguments = _DECODER.decode(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + text).encode()  # fails for half a surrogate pair, which no wire can carry
    except (ValueError, RecursionError):
        return None
    return name, text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_OBJECT = re.compile(r"\s*\{")
_SEPARATOR = re.compile(r"\s*;")
_BLOCK_END = re.compile(r"[\s}]*(</tool_call>|\Z)")
"""Also after a brace too many."""
_PYTHON = re.compile(
    r"""(['"])((?:\\.|(?!\1)[^\\])*+)\1|['"].*|\b(?:True|False|None)\b""", re.DOTALL
)
"""Strings, and the constants outside of them."""
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_QUOTE = re.compile(r'\\.|"', re.DOTALL)
_QUOTES = {"\\'": "'", '"': '\\"'}
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
