"""The fold over a turn's output: slices, offsets, digests, and where it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestore.digest import RollingDigest
from statestore.records import FinishReason
from workers.text.byte_vocabulary import END_OF_TURN
from workers.text.bytes_codec import BytesCodec
from workers.turn.output import MAX_TOKENS_PER_EVENT, FinishRules, TurnOutput

SALT = b"s" * 32
PROMPT = [1, 2, 3]
CODEC = BytesCodec()


def output(
    *, max_tokens: int = 10_000, min_tokens: int = 0, stop: tuple[str, ...] = ()
) -> TurnOutput:
    rules = FinishRules(max_tokens, min_tokens, frozenset({END_OF_TURN}))
    start = RollingDigest.of(SALT, PROMPT)
    return TurnOutput(start, lambda: CODEC.folder(stop, min_tokens), rules)


def fed(text: str, **rules: object) -> TurnOutput:
    out = output(**rules)  # type: ignore[arg-type]
    out.push(list(text.encode()))
    return out


def test_an_end_of_turn_token_ends_the_output_and_what_follows_is_dropped() -> None:
    out = output()
    out.push([*b"hi", END_OF_TURN, *b"more"])
    assert out.reason is FinishReason.STOP
    assert out.tokens == [*b"hi", END_OF_TURN]
    out.end()
    assert out.text == "hi"


def test_the_length_is_bounded() -> None:
    out = fed("hello", max_tokens=3)
    assert out.reason is FinishReason.LENGTH
    assert out.tokens == [*b"hel"]


def test_no_stop_is_obeyed_before_min_tokens() -> None:
    out = output(min_tokens=3)
    out.push([END_OF_TURN, *b"a"])
    assert out.reason is None
    out.push([END_OF_TURN])
    assert out.reason is FinishReason.STOP


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    out = fed("one STOP two", stop=("STOP",))
    assert out.reason is FinishReason.STOP
    assert bytes(out.tokens) == b"one STOP"
    out.seal()
    out.end()
    assert out.text == "one "
    assert out.text_end == 4


def test_held_back_text_is_released_by_the_end() -> None:
    out = fed("one ST", stop=("STOP",))
    out.seal()
    event = out.event(0, 6)
    assert event is not None
    assert event.text == "one "
    out.end()
    assert out.tail == ("ST", 4)
    assert out.text == "one ST"


def test_only_sealed_and_released_tokens_are_sent() -> None:
    out = fed("ab")
    assert out.event(0, 2) is None
    out.seal()
    out.push(list(b"cd"))
    head = out.seal()
    event = out.event(0, 2)
    assert event is not None
    assert bytes(event.token_ids) == b"ab"
    event = out.event(1, 4)
    assert event is not None
    assert (bytes(event.token_ids), event.position) == (b"bcd", 4)
    assert event.digest == head.digest
    assert out.event(4, 4) is None


def test_a_cut_forgets_what_never_reached_the_ledger() -> None:
    out = output(stop=("XY",))
    out.push(list(b"aX"))
    out.seal()
    out.push(list(b"bc"))
    out.seal()
    before = out.digest_at(2)
    out.end(2)
    assert bytes(out.tokens) == b"aX"
    assert out.text == "aX"
    assert out.seal().digest == before
    out.end(2)
    assert out.text == "aX"


def test_a_cut_between_two_seals_has_its_own_digest() -> None:
    out = fed("abcdef")
    out.seal()
    expected = RollingDigest.of(SALT, [*PROMPT, *b"abc"]).position()
    out.end(3)
    assert out.seal() == expected
    event = out.event(0, 3)
    assert event is not None
    assert event.digest == expected.digest


def test_a_large_backlog_comes_in_several_events() -> None:
    out = output(max_tokens=1 << 20)
    for _ in range(10):
        out.push([97] * 1000)
        out.seal()
    sizes, at = [], 0
    while (event := out.event(at, 10_000)) is not None:
        sizes.append(len(event.token_ids))
        at += sizes[-1]
    assert sum(sizes) == 10_000
    assert max(sizes) <= MAX_TOKENS_PER_EVENT
    assert len(sizes) == 3


TEXTS = st.text(alphabet="aé€😀X", max_size=40)


@given(text=TEXTS, cuts=st.lists(st.integers(1, 7), min_size=1), start=st.integers(0, 60))
def test_events_from_anywhere_join_without_a_gap(text: str, cuts: list[int], start: int) -> None:
    data = list(text.encode())
    out, at, cut = output(stop=("aX",)), 0, 0
    while at < len(data):
        out.push(data[at : at + cuts[cut % len(cuts)]])
        out.seal()
        at += cuts[cut % len(cuts)]
        cut += 1
    out.end()
    released = len(out.tokens)
    at = min(start, released)
    tokens: list[int] = []
    said, offset = "", None
    while (event := out.event(at, released)) is not None:
        assert event.position == len(PROMPT) + at
        offset = event.text_offset if offset is None else offset
        assert event.text_offset == offset + len(said)
        said += event.text
        tokens += event.token_ids
        at += len(event.token_ids)
        assert event.digest == out.digest_at(at)
    tail, tail_offset = out.tail
    assert tokens == out.tokens[min(start, released) :]
    if offset is not None:
        assert tail_offset == offset + len(said)
        assert out.text[offset:] == said + tail
    assert out.text == text.split("aX")[0]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_digests_are_those_of_the_whole_ledger(count: int) -> None:
    out = output()
    out.push([97] * count)
    head = out.seal()
    assert head == RollingDigest.of(SALT, [*PROMPT, *[97] * count]).position()
    assert out.digest_at(count) == head.digest
