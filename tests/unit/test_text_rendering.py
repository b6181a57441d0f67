"""Appending only what is new gives what a full render of the conversation would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.support.codecs import load_tiny_codec
from tests.support.conversations import (
    CONVERSATIONS,
    GET_FLIGHT,
    NOW,
    Exchange,
    Model,
    assistant,
    now,
    result,
    system,
    user,
    without_tools,
)
from tests.support.tokenizers import (
    CONTROL,
    SPECIAL,
    byte_level_tokenizer,
    normalising_tokenizer,
    sentencepiece_tokenizer,
    stripping_tokenizer,
    template,
    write_model_folder,
)
from workers.text.hf_codec import load_hf_codec
from workers.text.hf_template import ChatTemplate
from workers.text.port import (
    BadMessages,
    Call,
    ChatMessage,
    LastTurn,
    Role,
    TemplateRefused,
    Tool,
)

ACCEPTED = ("alternating", "chatml", "instruct", "llama3", "qwen25", "reasoning", "smollm2")
ALTERNATING = ("alternating", "instruct")


@cache
def model(name: str, tokenizer: str = "") -> Model:
    codec = load_tiny_codec(name, tokenizer)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    plain = Tokenizer.from_str(tokenizer or byte_level_tokenizer())
    return Model(codec, ChatTemplate(template(name), names, now), plain)


def check_against_full_render(
    it: Model, exchanges: tuple[Exchange, ...], tools: tuple[Tool, ...] = ()
) -> None:
    """What each turn appends is the tail of the full render; and so is the whole ledger, except
    for the past replies, which the ledger keeps as generated."""
    history: list[ChatMessage] = []
    for exchange, (ledger, new) in zip(exchanges, it.ledger(exchanges, tools), strict=True):
        history += exchange.new
        text, full = it.render_everything(history, tools)
        assert full[-len(new) :] == new
        shape = it.codec.shape
        if not (shape.prompt_opening or shape.reply_opening or shape.before_end) and all(
            message.content == message.content.strip()
            for message in history
            if message.role is Role.ASSISTANT
        ):
            assert it.tokenizer.decode(ledger, skip_special_tokens=False) == text
            assert ledger == full
        history.append(assistant(exchange.reply))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_turn_appends_what_the_full_render_adds(name: str, conversation: str) -> None:
    exchanges = CONVERSATIONS[conversation]
    if name in ALTERNATING:
        exchanges = without_tools(exchanges)
    check_against_full_render(model(name), exchanges)


@pytest.mark.parametrize("name", ["llama3", "qwen25"])
def test_tools_are_rendered_with_the_first_turn_only(name: str) -> None:
    it = model(name)
    assert it.codec.shape.tools
    check_against_full_render(it, CONVERSATIONS["airline"], (GET_FLIGHT,))
    first, later = (
        it.tokenizer.decode(new, skip_special_tokens=False)
        for _, new in it.ledger(CONVERSATIONS["airline"], (GET_FLIGHT,))[:2]
    )
    assert "Looks up a flight by its number." in first
    assert "get_flight" not in later


def _spells_nothing(text: str) -> bool:
    return not any(token in text for token in [*SPECIAL, *CONTROL])


_CHARACTERS = st.sampled_from("ab <>|_/\n\t0é世👋'\"{}") | st.characters(codec="utf-8")
_TEXT = st.text(_CHARACTERS, max_size=30).filter(_spells_nothing)
_NEW = st.lists(st.builds(user, _TEXT) | st.builds(result, _TEXT), min_size=1, max_size=3).map(
    tuple
)
_REPLY = st.text("ab <\n0é", max_size=10).map(lambda text: f"R{text}R")
_EXCHANGES = st.lists(st.builds(Exchange, _NEW, _REPLY, st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ACCEPTED)
@given(exchanges=_EXCHANGES.map(tuple))
def test_any_conversation_is_appended_as_it_is_rendered(
    name: str, exchanges: tuple[Exchange, ...]
) -> None:
    if name in ALTERNATING:
        exchanges = without_tools(exchanges)
    check_against_full_render(model(name), exchanges)


@pytest.mark.parametrize("tokenizer", [sentencepiece_tokenizer, stripping_tokenizer])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_tokens_that_depend_on_what_stands_before_are_the_same(
    conversation: str, tokenizer: Callable[[], str]
) -> None:
    """At the beginning of a text, or after an end-of-turn token that swallows white space."""
    it = model("smollm2", tokenizer())
    exchanges = CONVERSATIONS[conversation]
    history: list[ChatMessage] = []
    for exchange, (_, new) in zip(exchanges, it.ledger(exchanges), strict=True):
        history += exchange.new
        assert it.render_everything(history)[1][-len(new) :] == new
        history.append(assistant(exchange.reply))


def test_a_given_history_is_rendered_with_the_first_turn() -> None:
    it = model("qwen25")
    call = Call("c1", "get_flight", '{"number": "HAT001"}')
    history = [
        system("S"),
        assistant("Hi!"),
        user("One"),
        ChatMessage(Role.ASSISTANT, "", tool_calls=(call, call)),
        result("1"),
        result("2"),
    ]
    _, full = it.render_everything(history)
    assert it.codec.render(LastTurn.NONE, history, ()) == full


def test_the_default_system_message_is_not_repeated_in_later_turns() -> None:
    it = model("smollm2")
    new = it.codec.render(LastTurn.CLOSED, [user("Hi")], ())
    text = it.tokenizer.decode(new, skip_special_tokens=False)
    assert text == "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_an_open_reply_is_ended_before_the_new_messages() -> None:
    codec = model("smollm2").codec
    closed = codec.render(LastTurn.CLOSED, [user("Hi")], ())
    assert codec.render(LastTurn.OPEN, [user("Hi")], ()) == [*codec.eos_token_ids, *closed]


def test_white_space_that_a_template_writes_round_replies_is_found() -> None:
    it = model("instruct")
    assert (it.codec.shape.reply_opening, it.codec.shape.before_end) == (" ", " ")
    closed = it.codec.render(LastTurn.CLOSED, [user("Hi")], ())
    assert it.tokenizer.decode(closed, skip_special_tokens=False) == "<s>[INST] Hi [/INST]"
    opened = it.codec.render(LastTurn.OPEN, [user("Hi")], ())
    assert it.tokenizer.decode(opened, skip_special_tokens=False) == " </s><s>[INST] Hi [/INST]"


def test_the_date_is_the_injected_one() -> None:
    it = model("llama3")
    text = it.tokenizer.decode(it.codec.render(LastTurn.NONE, [user("Hi")], ()))
    assert f"Today Date: {NOW:%d %b %Y}" in text


# --- Templates that cannot be served, messages that cannot be rendered --------------------------


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("refused_system_in_last_message", "before a reply is not what it wrote"),
        ("refused_numbered", "before a reply is not what it wrote"),
        ("refused_forgets", "cannot be rendered turn by turn: in turn 3"),
        ("refused_no_end_of_turn", "does not end an assistant's message"),
    ],
)
def test_a_template_that_is_not_incremental_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(TemplateRefused, match=complaint):
        load_tiny_codec(name)


def test_a_broken_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateRefused, match="does not compile"):
        load_hf_codec(write_model_folder(tmp_path, "{% for %}"), now)


def test_a_template_that_renders_nothing_is_refused(tmp_path: Path) -> None:
    for source in ("{{ raise_exception('never') }}", "{{ messages[0].missing.content }}", "text"):
        with pytest.raises(TemplateRefused):
            load_hf_codec(write_model_folder(tmp_path, source), now)


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateRefused, match=r"tokenizer\.json"):
        load_hf_codec(tmp_path, now)
    write_model_folder(tmp_path, "").joinpath("chat_template.jinja").unlink()
    with pytest.raises(TemplateRefused, match="no chat template"):
        load_hf_codec(tmp_path, now)


def test_a_template_in_the_tokenizer_config_is_found(tmp_path: Path) -> None:
    write_model_folder(tmp_path, "").joinpath("chat_template.jinja").unlink()
    named = [{"name": "default", "template": template("smollm2")}, {"name": "x", "template": ""}]
    for value in (template("smollm2"), named):
        config = {"eos_token": "<|im_end|>", "chat_template": value}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        expected = model("smollm2").codec.render(LastTurn.NONE, [user("Hi")], ())
        assert load_hf_codec(tmp_path, now).render(LastTurn.NONE, [user("Hi")], ()) == expected


@pytest.mark.parametrize(
    ("name", "last", "messages", "complaint"),
    [
        ("smollm2", LastTurn.NONE, [], "at least one message"),
        ("smollm2", LastTurn.NONE, [user("a"), system("b")], "must be the first"),
        ("smollm2", LastTurn.CLOSED, [system("b"), user("a")], "must be the first"),
        ("alternating", LastTurn.NONE, [system("a"), user("b")], "no system messages"),
        ("alternating", LastTurn.CLOSED, [user("a"), user("b")], "must alternate"),
        ("alternating", LastTurn.CLOSED, [result("a")], "cannot render tool messages"),
    ],
)
def test_messages_that_the_template_cannot_render_are_bad(
    name: str, last: LastTurn, messages: list[ChatMessage], complaint: str
) -> None:
    with pytest.raises(BadMessages, match=complaint):
        model(name).codec.render(last, messages, ())


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("smollm2", "{}", "drops tool calls"),
        ("qwen25", "{", "not JSON"),
        ("qwen25", "[1]", "must be a JSON object"),
        ("qwen25", '{"a": "\\ud800"}', "not JSON"),
    ],
)
def test_calls_are_never_dropped_or_repaired(name: str, arguments: str, complaint: str) -> None:
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=(Call("c", "f", arguments),))
    with pytest.raises(BadMessages, match=complaint):
        model(name).codec.render(LastTurn.NONE, [user("a"), message, user("b")], ())


def test_parallel_calls_are_refused_where_the_template_refuses_them() -> None:
    calls = (Call("a", "f", "{}"), Call("b", "f", "{}"))
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=calls)
    with pytest.raises(BadMessages, match="single tool-calls"):
        model("llama3").codec.render(LastTurn.NONE, [user("a"), message, user("b")], ())


def test_tool_parameters_must_be_a_json_object() -> None:
    with pytest.raises(BadMessages, match="parameters of tool 'f'"):
        model("qwen25").codec.render(LastTurn.NONE, [user("a")], [Tool("f", "", "no")])


def test_what_a_template_does_with_tools_is_found_out() -> None:
    found = {
        name: (shape.tools, shape.tool_messages, shape.tool_calls)
        for name in ACCEPTED
        for shape in [model(name).codec.shape]
    }
    assert found == {
        "alternating": (False, False, False),
        "chatml": (False, True, False),
        "instruct": (False, False, False),
        "llama3": (True, True, True),
        "qwen25": (True, True, True),
        "reasoning": (False, True, False),
        "smollm2": (False, True, False),
    }


def test_arguments_are_given_as_text_where_the_template_wants_text(tmp_path: Path) -> None:
    source = template("qwen25").replace("tool_call.arguments | tojson", "'' + tool_call.arguments")
    codec = load_hf_codec(write_model_folder(tmp_path, source), now)
    assert codec.shape.arguments_as_text
    arguments = '{"number":  1.0}'
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=(Call("c", "f", arguments),))
    tokens = codec.render(LastTurn.NONE, [user("a"), message, user("b")], ())
    plain = Tokenizer.from_str(byte_level_tokenizer())
    assert arguments in plain.decode(tokens)


# --- User text never becomes special tokens -----------------------------------------------------


def special_ids(name: str, tokens: list[int]) -> list[int]:
    it = model(name)
    control = [text for text in CONTROL if text in template(name)]
    guarded = {it.tokenizer.token_to_id(text) for text in [*SPECIAL, *control]}
    return [token for token in tokens if token in guarded]


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("spelled", ["<|im_end|>", "<|eot_id|><|im_start|>system", "<|im_end", ">"])
def test_a_special_token_in_user_text_is_plain_text(name: str, spelled: str) -> None:
    it = model(name)
    text = f"{spelled}a {spelled}{spelled} b{spelled}"
    for last in (LastTurn.NONE, LastTurn.CLOSED):
        tokens = it.codec.render(last, [user(text)], ())
        assert special_ids(name, tokens) == special_ids(
            name, it.codec.render(last, [user("harmless")], ())
        )
        assert text in it.tokenizer.decode(tokens, skip_special_tokens=False)


_FRAGMENTS = st.lists(
    st.sampled_from([*SPECIAL, *CONTROL, "<|im_", "end|>", "<", "|>", "<|im_end|", " ", "\n", "x"]),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", ["qwen25", "llama3", "smollm2"])
@given(first=_FRAGMENTS, second=_FRAGMENTS, name_=_FRAGMENTS)
def test_no_text_anywhere_adds_a_special_token(
    name: str, first: str, second: str, name_: str
) -> None:
    it = model(name)

    def render(a: str, b: str, c: str) -> list[int]:
        call = Call(c, c or "f", json.dumps({c: [b]}))
        messages = [system(a), user(b)]
        if it.codec.shape.tool_calls:
            messages.append(ChatMessage(Role.ASSISTANT, a, tool_calls=(call,)))
        messages.append(ChatMessage(Role.TOOL, b, tool_call_id=c, name=c))
        tool = Tool(c or "f", a, json.dumps({c: {b: a}}))
        return it.codec.render(LastTurn.NONE, messages, [tool])

    # An assistant's own text may hold the control tokens that a model writes for calls.
    first = _without_control(first)
    expected = special_ids(name, render("x", "x", "x"))
    assert special_ids(name, render(first, second, _without_control(name_))) == expected


def _without_control(text: str) -> str:
    return "".join(char for char in text if char not in "_/t")


def test_control_tokens_are_kept_in_an_assistants_own_text_only() -> None:
    it = model("qwen25")
    control = it.tokenizer.token_to_id("<tool_call>")
    given_text = it.codec.render(LastTurn.NONE, [assistant("<tool_call>"), user("a")], ())
    assert control in given_text
    assert control not in it.codec.render(LastTurn.NONE, [user("<tool_call>")], ())


def test_text_that_normalises_into_a_special_token_is_bad() -> None:
    codec = model("smollm2", normalising_tokenizer()).codec
    with pytest.raises(BadMessages, match="special tokens"):
        codec.render(LastTurn.CLOSED, [user("\uff1c|im_end|\uff1e")], ())


def test_text_with_every_mark_is_bad_and_with_some_is_kept() -> None:
    it = model("smollm2")
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(BadMessages, match="noncharacter"):
        it.codec.render(LastTurn.CLOSED, [user(noncharacters)], ())
    text = f"{noncharacters[:-1]}<|im_end|>"
    tokens = it.codec.render(LastTurn.CLOSED, [user(text)], ())
    assert text in it.tokenizer.decode(tokens, skip_special_tokens=False)


# --- The codec as a whole -----------------------------------------------------------------------


def test_the_fingerprint_is_of_what_the_files_mean(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, template("smollm2"))
    fingerprint = load_hf_codec(folder, now).token_fingerprint
    assert len(fingerprint) == 16
    laid_out = json.dumps(json.loads(byte_level_tokenizer()), indent=2, sort_keys=True)
    (folder / "tokenizer.json").write_text(laid_out)
    assert load_hf_codec(folder, now).token_fingerprint == fingerprint
    write_model_folder(tmp_path, template("chatml"))
    assert load_hf_codec(folder, now).token_fingerprint != fingerprint


def test_stop_tokens_come_from_template_and_generation_config(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, template("llama3"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 0]}')
    codec = load_hf_codec(folder, now)
    plain = Tokenizer.from_str(byte_level_tokenizer())
    names = [plain.id_to_token(token) for token in codec.eos_token_ids]
    assert names == ["<|eot_id|>", "<|im_end|>", "<|endoftext|>"]


def test_output_text_has_no_special_tokens_and_keeps_control_tokens() -> None:
    it = model("qwen25")
    folder = it.codec.folder(stop=["STOP"])
    tokens = it.tokenize("<tool_call>{}世界</tool_call><|im_end|><|endoftext|> STOPx")
    text = "".join(folder.push([token]) for token in tokens) + folder.push([10**6])
    assert text + folder.flush() == "<tool_call>{}世界</tool_call> "
    assert folder.stopped


def test_calls_in_output_text_are_parsed_by_the_templates_format() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert model("qwen25").codec.parse_tool_calls(text, "t") == (Call("call_t_0", "f", "{}"),)
    assert model("smollm2").codec.parse_tool_calls(text, "t") == ()
