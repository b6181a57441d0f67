"""Exact bytes per token, and the guard that keeps user text from spelling special tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.support.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from workers.text.port import TemplateRefused
from workers.text.special_text import SpecialText, unused_mark
from workers.text.token_bytes import byte_table

BYTE_LEVEL = Tokenizer.from_str(byte_level_tokenizer())
BYTE_LEVEL_BYTES = byte_table(json.loads(byte_level_tokenizer()))
SENTENCEPIECE = Tokenizer.from_str(sentencepiece_tokenizer())
SENTENCEPIECE_BYTES = byte_table(json.loads(sentencepiece_tokenizer()))

MARK = "\ufdd0"
GUARD = SpecialText({"<|a|>": 1, "<|a|><|b": 2, "ab": 3, "ba": 4, "</s>": 5})


@given(st.text(st.characters(codec="utf-8")))
def test_the_bytes_of_byte_level_tokens_are_the_text(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert b"".join(BYTE_LEVEL_BYTES[token] for token in tokens) == text.encode()


@given(st.text("abc the user世👋\n", min_size=1))
def test_the_bytes_of_sentencepiece_tokens_are_the_text_after_a_space(text: str) -> None:
    tokens = SENTENCEPIECE.encode(text, add_special_tokens=False).ids
    data = b"".join(SENTENCEPIECE_BYTES[token] for token in tokens)
    assert data.removeprefix(b" ") == text.encode().removeprefix(b" ")


def test_special_tokens_have_no_bytes_and_control_tokens_have_their_text() -> None:
    special, control = BYTE_LEVEL.encode("<|im_end|><tool_call>").ids
    assert BYTE_LEVEL_BYTES[special] == b""
    assert BYTE_LEVEL_BYTES[control] == b"<tool_call>"


def test_the_table_covers_every_id() -> None:
    assert len(BYTE_LEVEL_BYTES) == BYTE_LEVEL.get_vocab_size(with_added_tokens=True)


def test_a_unigram_vocabulary_is_read_in_order() -> None:
    model = {"vocab": [["<unk>", 0.0], ["\u2581a", -1.0], ["<0xE9>", -2.0]]}
    tokenizer = {"model": model, "decoder": {"type": "Metaspace"}, "added_tokens": []}
    assert byte_table(tokenizer) == (b"<unk>", b" a", b"\xe9")


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##"}])
def test_a_tokenizer_without_exact_bytes_is_refused(decoder: object) -> None:
    with pytest.raises(TemplateRefused, match="no exact bytes"):
        byte_table({"model": {"vocab": {"a": 0}}, "decoder": decoder})


_SPELLING = st.text("<|ab>/s x\n", max_size=12)


@given(_SPELLING, _SPELLING, st.sampled_from(["", "<|a|>", "a", "b", " ", "<", "|>"]))
def test_no_piece_spells_more_than_the_template_wrote(one: str, two: str, between: str) -> None:
    """Whatever stands beside it; the template here writes ``between``, and twice ``<|a|>``."""

    def render(first: str, second: str) -> str:
        return f"<|a|>{first.strip()}{between}{second}<|a|>"

    pieces = GUARD.pieces(render(GUARD.mark(one, MARK), GUARD.mark(two, MARK)), MARK)
    assert "".join(pieces) == render(one, two)
    spelled = [token for piece in pieces for token in _spelled(piece)]
    assert spelled == ["<|a|>", *_spelled(between), "<|a|>"]


def _spelled(text: str) -> list[str]:
    found, position = [], 0
    while match := GUARD.first(text, position):
        found.append(match[0])
        position = match.end()
    return found


@given(_SPELLING, _SPELLING)
def test_text_that_spells_nothing_is_one_piece(one: str, two: str) -> None:
    rendered = f"\n{one}\n{two}\n"
    marked = f"\n{GUARD.mark(one, MARK)}\n{GUARD.mark(two, MARK)}\n"
    if not _spelled(rendered):
        assert GUARD.pieces(marked, MARK) == [rendered]


def test_a_mark_beside_a_special_token_of_the_template_is_no_border() -> None:
    marked = GUARD.mark("x <", MARK)
    assert MARK in marked
    assert GUARD.pieces(f"{marked}<|a|>", MARK) == ["x <<|a|>"]


def test_marking_reaches_every_string_of_a_value() -> None:
    value = {"</s>": ["</s>", 1, None, {"x": ("</s>", True)}], "y": 2.5}
    marked = "<\ufdd0/s>"
    assert GUARD.mark(value, MARK) == {marked: [marked, 1, None, {"x": [marked, True]}], "y": 2.5}


def test_a_mark_is_one_that_no_string_holds() -> None:
    assert unused_mark([{"a\ufdd0": ["\ufdd1"]}, "\ufdd3"]) == "\ufdd2"
