"""Text from outside, in and out of tokens: no text becomes a special token, what cannot be rendered
is BadMessages, and no parser of a model's output fails or takes long."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from sessile.v1 import types_pb2 as pb

from gateway.core.errors import InvalidRequest
from tests.fuzz.hostile import Hostile, seeds
from tests.fuzz.profile import fuzz
from tests.support.codecs import CODECS, codec, load_tiny_codec
from tests.support.tokenizers import (
    CONTROL,
    SPECIAL,
    byte_level_tokenizer,
    normalising_tokenizer,
    sentencepiece_tokenizer,
    stripping_tokenizer,
)
from workers.text.port import (
    BadMessages,
    Call,
    ChatMessage,
    LastTurn,
    Role,
    TextCodec,
    Tool,
)
from workers.text.tool_calls import parse_hermes, parse_llama3
from workers.turn.request import chat_messages, chat_tools

PATIENCE_S = 5.0
"""Far above what anything here takes, far below what a quadratic algorithm takes."""
PIECES = (
    *SPECIAL,
    *CONTROL,
    "<|", "|>", "<", ">", "im_start", "im_end|>", "<|im_end|", "</s", "<s", "[INST]", "system\n",
    "\0", "\x1b[2J", "\r\n", "\ufeff", "\ufdd0", "\ufdd1", "\ufdef", "\ufffd", "\u202e", "\u200b",
    "\uff1c|im_end|\uff1e", "<\uff5cim_end\uff5c>", "\uff49m", "e\u0301", "é",
    "\U0001f468\u200d\U0001f469", "世界",
    "\\ud800", "&lt;|im_end|&gt;", "{{ bos_token }}", "{% raw %}", "None", " ", "\n\n", "▁", "Ġ",
    "Sessile's stub reply", "assistant\n", "x" * 300,
)  # fmt: skip
TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "stripping": stripping_tokenizer,
    "normalising": normalising_tokenizer,
}

nasty_texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=6).map("".join)


class Conversation:
    """A conversation of hostile strings, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def text(self) -> str:
        pieces = self.draw.choices(PIECES, k=self.draw.randrange(6))
        return "".join(pieces)

    def json(self, depth: int = 0) -> Any:
        match self.draw.randrange(7 if depth < 4 else 4):
            case 0:
                return self.text()
            case 1:
                return self.draw.choice((0, -1, 1e300, 10**40, 0.1))
            case 2:
                return None
            case 3:
                return True
            case 4:
                return [self.json(depth + 1) for _ in range(self.draw.randrange(3))]
            case _:
                return {self.text(): self.json(depth + 1) for _ in range(self.draw.randrange(4))}

    def json_text(self) -> str:
        return self.draw.choice(
            (
                json.dumps(self.json()),
                json.dumps({self.text(): self.json()}),
                json.dumps({self.text(): self.json()}, ensure_ascii=False),
                '{"a": "\\ud800"}',
                '{"a": NaN}',
                '{"a": ' * self.draw.choice((50, 990, 5000)),
                "[" * 100_000,
                '{"a": 1' + "0" * 5000 + "}",
                "",
                self.text(),
            )
        )

    def message(self, role: Role) -> ChatMessage:
        draw = self.draw
        calls = [Call(self.text(), self.text(), self.json_text()) for _ in range(draw.randrange(3))]
        return ChatMessage(
            role,
            self.text(),
            tuple(calls) if role is Role.ASSISTANT and draw.random() < 0.5 else (),
            self.text() if draw.random() < 0.5 else "",
            self.text() if draw.random() < 0.3 else "",
        )

    def tools(self) -> list[Tool]:
        count = self.draw.choice((0, 0, 1, 2))
        return [Tool(self.text(), self.text(), self.json_text()) for _ in range(count)]

    def messages(self) -> list[ChatMessage]:
        roles = self.draw.choice(
            (
                (Role.USER,),
                (Role.SYSTEM, Role.USER),
                (Role.USER, Role.ASSISTANT, Role.TOOL, Role.USER),
                tuple(self.draw.choices(tuple(Role), k=self.draw.randrange(4))),
            )
        )
        return [self.message(role) for role in roles]


def specials_of(it: TextCodec, tokens: list[int]) -> list[int]:
    """The tokens that no text stands for."""
    found = []
    for token in tokens:
        folder = it.folder()
        if not folder.push([token]) + folder.flush():
            found.append(token)
    return found


def harmless(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The same conversation with plain words for every text."""
    return [
        ChatMessage(
            message.role,
            "word",
            tuple(Call("c", "f", "{}") for _ in message.tool_calls),
            "c" if message.tool_call_id else "",
            "f" if message.name else "",
        )
        for message in messages
    ]


def loaded(name: str) -> TextCodec:
    """``template`` or ``template/tokenizer``."""
    template, _, tokenizer = name.partition("/")
    return load_tiny_codec(template, TOKENIZERS[tokenizer]()) if tokenizer else codec(template)


EVERY = [*CODECS, *(f"qwen25/{name}" for name in TOKENIZERS), "llama3/normalising"]


@pytest.mark.parametrize("name", EVERY)
def test_hostile_conversations_are_rendered_without_their_specials_or_refused(name: str) -> None:
    it = loaded(name)

    @fuzz(60)
    @given(seeds)
    def fuzzed(seed: int) -> None:
        told = Conversation(seed)
        last = told.draw.choice(tuple(LastTurn))
        messages, tools = told.messages(), told.tools()
        began = time.thread_time()
        try:
            tokens = it.render(last, messages, tools)
        except BadMessages:
            return
        finally:
            assert time.thread_time() - began < PATIENCE_S
        assert all(0 <= token < it.vocab_size for token in tokens)
        plain = [Tool("f", "d", "{}") for _ in tools]
        expected = specials_of(it, it.render(last, harmless(messages), plain))
        assert specials_of(it, tokens) == expected

    fuzzed()


@pytest.mark.parametrize("name", EVERY)
def test_no_text_of_a_user_becomes_a_special_token(name: str) -> None:
    it = loaded(name)
    expected = specials_of(it, it.render(LastTurn.CLOSED, [ChatMessage(Role.USER, "word")], ()))

    @fuzz(80)
    @given(nasty_texts)
    def fuzzed(text: str) -> None:
        try:
            tokens = it.render(LastTurn.CLOSED, [ChatMessage(Role.USER, text)], ())
        except BadMessages:
            return
        assert specials_of(it, tokens) == expected

    fuzzed()


@pytest.mark.parametrize("name", CODECS)
def test_any_tokens_fold_to_text_that_a_wire_can_carry(name: str) -> None:
    it = codec(name)

    @fuzz(80)
    @given(
        st.lists(st.integers(0, it.vocab_size + 10) | st.just(2**32 - 1), max_size=40),
        st.lists(nasty_texts.filter(bool), max_size=3),
        st.integers(0, 5),
    )
    def fuzzed(tokens: list[int], stop: list[str], min_tokens: int) -> None:
        whole, pieces = it.folder(stop, min_tokens), it.folder(stop, min_tokens)
        text = whole.push(tokens) + whole.flush()
        assert "".join(pieces.push([token]) for token in tokens) + pieces.flush() == text
        assert pieces.text_length == whole.text_length == len(text)
        text.encode()
        it.parse_tool_calls(text, "t")

    fuzzed()


@fuzz(200)
@given(seeds)
def test_hostile_wire_messages_are_read_or_refused(seed: int) -> None:
    hostile = Hostile(seed)
    data = hostile.message(pb.RunTurnRequest).SerializeToString()
    try:
        request = pb.RunTurnRequest.FromString(hostile.damage(data))
    except DecodeError:
        return
    try:
        messages = chat_messages(request.messages)
    except InvalidRequest:
        return
    for name in CODECS:
        with suppress(BadMessages):
            codec(name).render(LastTurn.CLOSED, messages, ())


@pytest.mark.parametrize(
    "parameters",
    [
        "[]",
        "nan",
        '{"a": NaN',
        "[" * 100_000,
    ],
    ids=["list", "nan", "not a number", "deep"],
)
def test_tool_schemas_that_are_no_object_are_refused(parameters: str) -> None:
    with pytest.raises(InvalidRequest):
        chat_tools([pb.ToolDefinition(name="t", parameters_json=parameters)])


# -- tool calls ------------------------------------------------------------------------------------

DATA = Path(__file__).parent.parent / "data"
WRITTEN: list[str] = [
    *(case["text"] for case in json.loads((DATA / "tool_calls.json").read_text("utf-8"))),
    *(
        case["text"]
        for case in json.loads((DATA / "tool_calls_recorded.json").read_text("utf-8"))["cases"]
    ),
]
MARKS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]", '"',
    "'", "\\", "\\ud800", "\\u", ";", ",", ":", "NaN", "None", "True", "1e999", '"name"', "\0",
    '"arguments"', '"parameters"', '{"name": "f", "arguments": ', "9" * 5000, "\ud7ff", " " * 50,
)  # fmt: skip
PARSERS = {"hermes": parse_hermes, "llama3": parse_llama3}


def check_calls(parser: str, text: str) -> None:
    began = time.thread_time()
    calls = PARSERS[parser](text, "t")
    assert time.thread_time() - began < PATIENCE_S
    for index, call in enumerate(calls):
        assert call.id == f"call_t_{index}"
        assert call.name
        assert isinstance(json.loads(call.arguments), dict)
        # What is found can be put on the wire.
        pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments).SerializeToString()


def mutated(seed: int) -> str:
    draw = random.Random(seed)
    text = draw.choice(WRITTEN)
    for _ in range(draw.randrange(1, 6)):
        at, end = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
        match draw.randrange(4):
            case 0:
                text = text[:at] + text[end:]
            case 1:
                text = text[:at] + text[at:end] * draw.choice((2, 3, 30)) + text[end:]
            case 2:
                text = text[:at] + draw.choice(MARKS) * draw.choice((1, 2, 100)) + text[at:]
            case _:
                text = text[:at] + draw.choice(WRITTEN) + text[at:]
        text = text[:200_000]
    return text


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_outputs_of_models_are_parsed_or_are_no_calls(parser: str) -> None:
    @fuzz(300)
    @given(seeds)
    def fuzzed(seed: int) -> None:
        check_calls(parser, mutated(seed))

    fuzzed()


@pytest.mark.parametrize("parser", PARSERS)
def test_marks_in_any_order_are_parsed_or_are_no_calls(parser: str) -> None:
    @fuzz(300)
    @given(st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=30).map("".join))
    def fuzzed(text: str) -> None:
        check_calls(parser, text)

    fuzzed()


SIZE = 60_000
LONG = {
    "opened": "<tool_call>{" * (SIZE // 12),
    "opened strings": '<tool_call>{"' * (SIZE // 13),
    "opened python strings": "<tool_call>{'" * (SIZE // 13),
    "opened objects": '<tool_call>{"a":' * (SIZE // 16),
    "calls": '<tool_call>{"name":"f","arguments":{}}</tool_call>' * (SIZE // 50),
    "calls in a row": '{"name":"f","parameters":{}};' * (SIZE // 29),
    "calls before a space": '{"name":"f","parameters":{}};' * (SIZE // 29) + " " * SIZE,
    "deep": '{"name":"f","arguments":' + '{"a":' * (SIZE // 5),
    "deep and closed": '{"name":"f","arguments":' + '{"a":' * 900 + "1" + "}" * 901,
    "spaces": "<tool_call>" + " " * SIZE + "{",
    "spaces and blocks": ("<tool_call>" + " " * 100) * (SIZE // 111),
    "braces": '<tool_call>{"name":"f","arguments":{}}' + "}" * SIZE,
    "braces and blocks": ('<tool_call>{"name":"f","arguments":{}}' + "} " * 50) * (SIZE // 138),
    "backslashes": "{'" + "\\" * SIZE,
    "quotes": "{" + "'\"" * (SIZE // 2),
    "escaped quotes": "{" + "'\\'" * (SIZE // 3),
}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_outputs_are_parsed_in_bounded_time(parser: str, text: str) -> None:
    check_calls(parser, text)
    check_calls(parser, "<|python_tag|>" + text)


def test_many_open_blocks_take_time_in_proportion() -> None:
    """Calls are parsed on the worker's event loop: all its turns wait for it."""

    def seconds(size: int) -> float:
        text = "<tool_call>{" * (size // 12)
        began = time.thread_time()  # of its own: it may have to wait for the processor
        parse_hermes(text, "t")
        return time.thread_time() - began

    assert seconds(240_000) < 0.1 + 20 * seconds(30_000)
