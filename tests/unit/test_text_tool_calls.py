"""Calls are found where a model wrote them, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.codecs import load_tiny_codec
from tests.support.tokenizers import byte_level_tokenizer, template
from workers.text.tool_calls import MAX_BLOCKS, parse_hermes, parse_llama3, parser_for

DATA = Path(__file__).parent.parent / "data"
PARSERS = {"hermes": parse_hermes, "llama3": parse_llama3}
TYPICAL = json.loads((DATA / "tool_calls.json").read_text(encoding="utf-8"))
"""Written by hand after the formats' documentation."""
RECORDED = json.loads((DATA / "tool_calls_recorded.json").read_text(encoding="utf-8"))
"""Written by models; the file says where each was recorded."""


@pytest.mark.parametrize("case", TYPICAL, ids=lambda case: f"{case['format']}-{case['case']}")
def test_typical_outputs(case: dict[str, object]) -> None:
    found = PARSERS[str(case["format"])](str(case["text"]), "turn-1")
    assert [[call.name, json.loads(call.arguments)] for call in found] == case["calls"]
    assert [call.id for call in found] == [f"call_turn-1_{n}" for n in range(len(found))]


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["where"].split("/")[-1])
def test_recorded_outputs(case: dict[str, object]) -> None:
    assert case["source"] in RECORDED["sources"]
    found = PARSERS[str(case["format"])](str(case["text"]), "turn-1")
    assert [[call.name, json.loads(call.arguments)] for call in found] == case["calls"]


def test_the_format_is_chosen_by_the_template() -> None:
    assert parser_for(template("qwen25")) is parse_hermes
    assert parser_for(template("llama3")) is parse_llama3
    assert parser_for(template("smollm2")) is None
    assert parser_for("<tool_call>\n<function=name>") is None
    assert parser_for("<tool_call>name\n<arg_key>") is None


def test_marks_of_calls_are_text_even_where_they_are_special_tokens() -> None:
    tokenizer = json.loads(byte_level_tokenizer())
    for token in tokenizer["added_tokens"]:
        token["special"] = True  # as Hermes 2 Pro has <tool_call>
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    brace = tokenizer["model"]["vocab"]["{"]
    for name, marks in (
        ("llama3", ["<|python_tag|>"]),
        ("qwen25", ["<tool_call>", "</tool_call>"]),
    ):
        folder = load_tiny_codec(name, json.dumps(tokenizer)).folder()
        text = folder.push(
            [ids["<|eot_id|>"], ids[marks[0]], brace, *(ids[it] for it in marks[1:])]
        )
        assert text == marks[0] + "{" + "".join(marks[1:])


def test_a_call_in_a_models_reasoning_is_no_call() -> None:
    parse = parser_for("<tool_call> {{ content.split('</think>')[-1] }}")
    assert parse
    call = '<tool_call>{"name": "%s", "arguments": {}}</tool_call>'
    thinking = f"<think>I could {call % 'a'}.</think>{call % 'b'}"
    assert [it.name for it in parse(thinking, "t")] == ["b"]
    assert [it.name for it in parse(thinking.removeprefix("<think>"), "t")] == ["b"]
    assert parse(f"<think>I could {call % 'a'}", "t") == ()
    assert [it.name for it in parse(call % "c", "t")] == ["c"]


def test_arguments_keep_their_order_and_characters() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"z": "é\\u00e9", "a": 1.50}}</tool_call>'
    assert parse_hermes(text, "t")[0].arguments == '{"z": "éé", "a": 1.5}'


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<>/\"", max_size=3), inner)
    ),
    max_leaves=6,
)  # fmt: skip
_ARGUMENTS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), _JSON, max_size=3)
_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@given(st.lists(st.tuples(_NAMES, _ARGUMENTS), max_size=3), st.booleans())
def test_what_templates_write_is_read_back(
    calls: list[tuple[str, dict[str, object]]], ascii_only: bool
) -> None:
    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    hermes = "".join(
        f"\n<tool_call>\n{dump({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )
    llama = "; ".join(
        f'{{"name": {dump(name)}, "parameters": {dump(arguments)}}}' for name, arguments in calls
    )
    for found in (parse_hermes("Let me see." + hermes, "t"), parse_llama3(llama, "t")):
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls


_PIECES = st.sampled_from(
    ["'", "True", "1e9999", "<tool_call>", "</tool_call>",
     '{"name": "f", ', '"arguments": {}}', '"parameters": {', "}}",
     "{", "}", "[", "]", '"', "\\", "\n", ";", "<|python_tag|>", "NaN", "\\ud800", '"f"', ":", "x"]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=12).map("".join))
def test_broken_output_never_raises_and_calls_are_objects(text: str) -> None:
    for parse in PARSERS.values():
        for call in parse(text, "t"):
            assert call.name
            assert isinstance(json.loads(call.arguments), dict)
            call.arguments.encode()


def test_endless_nesting_is_no_call() -> None:
    deep = '{"name": "f", "parameters": ' + '{"a":' * 100_000
    assert parse_llama3(deep, "t") == ()
    assert parse_hermes("<tool_call>" + deep, "t") == ()


def test_a_model_that_goes_round_in_circles_is_not_followed_for_ever() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert len(parse_hermes(call * 100_000, "t")) == MAX_BLOCKS
    assert parse_hermes('<tool_call>{"' * 100_000, "t") == ()
