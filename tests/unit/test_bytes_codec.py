"""The sim engine's codec and its registry entry."""

from __future__ import annotations

import pytest

from workers.engines.registry import create_backend, parse_options
from workers.engines.sim.config import SimConfig, SimTiming
from workers.text.byte_vocabulary import ASSISTANT, BOS, END_OF_TURN, SYSTEM, USER
from workers.text.bytes_codec import BytesCodec
from workers.text.port import BadMessages, Call, ChatMessage, LastTurn, Role, TextCodec, Tool

CODEC: TextCodec = BytesCodec()
HELLO = ChatMessage(Role.USER, "hé")


def test_a_first_turn_has_the_system_part_with_its_tools() -> None:
    tool = Tool("look", "looks", '{"type": "object"}')
    system = ChatMessage(Role.SYSTEM, "Be brief.")
    tokens = CODEC.render(LastTurn.NONE, [system, HELLO], [tool])
    end = tokens.index(END_OF_TURN)
    assert tokens[:2] == [BOS, SYSTEM]
    text = bytes(tokens[2:end]).decode()
    assert text.startswith("Be brief.\nTools: [")
    assert '"name": "look"' in text
    assert tokens[end + 1 :] == [USER, *"hé".encode(), END_OF_TURN, ASSISTANT]
    without = CODEC.render(LastTurn.NONE, [HELLO], [tool])
    assert without[:2] == [BOS, SYSTEM]


def test_a_turn_that_was_left_open_is_closed_first() -> None:
    closed = CODEC.render(LastTurn.CLOSED, [HELLO], [])
    assert closed == [USER, *"hé".encode(), END_OF_TURN, ASSISTANT]
    assert CODEC.render(LastTurn.OPEN, [HELLO], []) == [END_OF_TURN, *closed]


def test_text_never_becomes_a_special_token() -> None:
    nasty = ChatMessage(Role.USER, "".join(map(chr, range(300))))
    tokens = CODEC.render(LastTurn.CLOSED, [nasty], [])
    assert max(tokens[1:-2]) < BOS


def test_tool_calls_and_results_are_kept() -> None:
    call = ChatMessage(Role.ASSISTANT, "", tool_calls=(Call("c1", "look", '{"at": 1}'),))
    result = ChatMessage(Role.TOOL, "nothing", tool_call_id="c1", name="look")
    text = bytes(t for t in CODEC.render(LastTurn.CLOSED, [call, result], []) if t < BOS).decode()
    assert all(part in text for part in ('"c1"', '"look"', '{\\"at\\": 1}', "nothing"))


@pytest.mark.parametrize(
    ("last_turn", "messages"),
    [
        (LastTurn.NONE, []),
        (LastTurn.NONE, [HELLO, ChatMessage(Role.SYSTEM, "late")]),
        (LastTurn.CLOSED, [ChatMessage(Role.SYSTEM, "late")]),
    ],
)
def test_messages_that_cannot_be_rendered(last_turn: LastTurn, messages: list[ChatMessage]) -> None:
    with pytest.raises(BadMessages):
        CODEC.render(last_turn, messages, [])


def test_output_text_skips_specials_and_holds_half_characters() -> None:
    folder = CODEC.folder(stop=["END"])
    released = [folder.push([t]) for t in [*"é".encode(), END_OF_TURN, *b"EN", *b"D!"]]
    assert released == ["", "é", "", "", "", "", ""]
    assert folder.stopped
    assert folder.text_length == 1


def test_a_backend_is_made_by_name_from_text_options() -> None:
    options = {"page_size": "8", "step_ms": "2.5", "model": "toy"}
    backend = create_backend("sim", options, lambda: 0.0)
    assert (backend.engine.info.page_size, backend.engine.info.model) == (8, "toy")
    assert backend.codec.vocab_size == backend.engine.info.vocab_size
    assert backend.codec.eos_token_ids == backend.engine.info.eos_token_ids


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("quantum", {}, "not one of sglang, sglang-server, sim, torch"),
        ("sim", {"pages": "8"}, "'pages' is not one of .*capacity_pages.*step_ms"),
        ("sim", {"page_size": "many"}, "page_size='many' must be int"),
        ("sim", {"page_size": "0"}, "positive"),
        ("sim", {"step_ms": "0"}, "take time"),
    ],
)
def test_unknown_and_contradictory_settings_are_refused(
    name: str, options: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        create_backend(name, options, lambda: 0.0)


def test_options_know_their_types() -> None:
    options = {"eos_probability": "0.5", "max_prefill_tokens": "7", "model": "mine"}
    config = parse_options(SimConfig, options)
    assert config == SimConfig(
        model="mine", eos_probability=0.5, timing=SimTiming(max_prefill_tokens=7)
    )
