"""The output fold: whole characters only, stop strings across tokens, nothing taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text.folder import OutputFolder
from workers.text.port import Folder


def byte_source(token_id: int) -> bytes:
    """Tokens 0..255 are single bytes; 256 is special and stands for nothing."""
    return b"" if token_id == 256 else bytes([token_id])


def folder(*stop: str, min_tokens: int = 0) -> Folder:
    return OutputFolder(byte_source, stop, min_tokens)


def fold(tokens: bytes | list[int], *stop: str, min_tokens: int = 0) -> str:
    it = folder(*stop, min_tokens=min_tokens)
    return it.push(list(tokens)) + it.flush()


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    it = folder()
    assert [it.push([b]) for b in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]
    assert it.text_length == 3


def test_a_character_that_never_ends_becomes_a_replacement_at_flush() -> None:
    it = folder()
    assert it.push(list("€".encode()[:2])) == ""
    assert it.flush() == "\ufffd"
    assert it.flush() == ""
    assert it.text_length == 1


def test_a_broken_character_does_not_swallow_what_follows() -> None:
    assert fold([0xE2, 0x82, ord("a"), 0xFF, ord("b")]) == "\ufffda\ufffdb"


def test_special_tokens_give_no_text_even_inside_a_character() -> None:
    assert fold([256, 0xC3, 256, 0xA9, 256]) == "é"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    it = folder("\nUser:")
    released = [it.push([b]) for b in b"ok\nUser: hi"]
    assert "".join(released) == "ok"
    assert it.stopped
    assert it.tokens_until_stop == len(b"ok\nUser:")
    assert it.text_length == 2
    assert it.flush() == ""


def test_a_possible_beginning_is_held_back_and_released_when_it_is_none() -> None:
    it = folder("STOP")
    assert [it.push([b]) for b in b"aSTxSTO"] == ["a", "", "", "STx", "", "", ""]
    assert it.flush() == "STO"
    assert not it.stopped
    assert it.tokens_until_stop is None


def test_a_beginning_inside_a_failed_beginning_is_still_held() -> None:
    assert fold(b"aaab|", "aab") == "a"
    assert fold(b"ababac", "abac") == "ab"


def test_of_several_stop_strings_the_first_complete_wins_then_the_longest() -> None:
    assert fold(b"xabcd", "abcd", "bc") == "xa"
    assert fold(b"xabc", "bc", "abc") == "x"
    assert OutputFolder(lambda _: b"xabcd", ("abcd", "bc")).push([0]) == "xa"


def test_a_stop_string_before_min_tokens_is_ordinary_text() -> None:
    assert fold(b"END1 END2", "END", min_tokens=4) == "END1 "
    assert fold(b"END", "END", min_tokens=3) == ""
    assert fold(b"END", "END", min_tokens=4) == "END"


def test_a_stop_string_let_pass_is_not_found_later_by_its_held_characters() -> None:
    it = folder("ab", "abc", min_tokens=3)
    assert [it.push([b]) for b in b"abx"] == ["", "", "abx"]
    assert not it.stopped


def test_tokens_after_the_stop_string_change_nothing() -> None:
    it = folder("!")
    assert it.push(list(b"hi! more")) == "hi"
    assert it.push(list(b"!!")) == ""
    assert (it.tokens_until_stop, it.text_length) == (3, 2)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        folder("")


# A small alphabet makes stop strings and their beginnings frequent.
_TOKENS = st.lists(st.sampled_from([*b"ab", 0xC3, 0xA9, 256]), max_size=40)
_STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(_TOKENS, _STOPS, st.integers(0, 12), st.data())
def test_any_split_gives_the_same_text_offsets_and_stop(
    tokens: list[int], stop: list[str], min_tokens: int, data: st.DataObject
) -> None:
    whole, split = (OutputFolder(byte_source, stop, min_tokens) for _ in range(2))
    expected = whole.push(tokens)
    text, rest = "", tokens
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        text += split.push(rest[:cut])
        rest = rest[cut:]
        assert split.text_length == len(text)
    assert text == expected
    assert split.tokens_until_stop == whole.tokens_until_stop
    assert text + split.flush() == expected + whole.flush()
    assert split.text_length == whole.text_length


@given(_TOKENS, _STOPS, st.integers(0, 12))
def test_released_text_is_the_decoded_text_cut_before_the_first_stop(
    tokens: list[int], stop: list[str], min_tokens: int
) -> None:
    """Against a reference that sees everything at once."""
    data = b"".join(map(byte_source, tokens))
    expected, stopped_at = data.decode("utf-8", "replace"), None
    for pushed in range(max(1, min_tokens), len(tokens) + 1):
        # Characters that are complete after so many tokens (the tail that is not is left off).
        decoded = [_complete(tokens[:n]) for n in (pushed - 1, pushed)]
        hits = [
            (end, end - len(s))
            for s in stop
            for end in range(len(decoded[0]) + 1, len(decoded[1]) + 1)
            if decoded[1][:end].endswith(s)
        ]
        if hits:
            expected, stopped_at = decoded[1][: min(hits)[1]], pushed
            break
    it = OutputFolder(byte_source, stop, min_tokens)
    assert it.push(tokens) + it.flush() == expected
    assert it.tokens_until_stop == stopped_at


def _complete(tokens: list[int]) -> str:
    data = b"".join(map(byte_source, tokens))
    return (data[:-1] if data[-1:] == b"\xc3" else data).decode("utf-8", "replace")
