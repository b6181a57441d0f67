"""The rolling digest of a ledger."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestore.digest import (
    BLOCK_TOKENS,
    DIGEST_BYTES,
    RollingDigest,
    pack_tokens,
    unpack_tokens,
)

SALT = b"s" * 32
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=3 * BLOCK_TOKENS)


@given(st.lists(TOKENS, max_size=6))
def test_a_digest_does_not_depend_on_how_tokens_were_appended(pieces: list[list[int]]) -> None:
    state = RollingDigest(SALT)
    for piece in pieces:
        state.update(piece)
    whole = RollingDigest.of(SALT, [token for piece in pieces for token in piece])
    assert state.position() == whole.position()


@given(TOKENS, st.integers(0, 2**32 - 1), st.data())
def test_a_changed_token_changes_the_digest(
    tokens: list[int], other: int, data: st.DataObject
) -> None:
    tokens = [*tokens, 1]
    index = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:index], other, *tokens[index + 1 :]]
    same = RollingDigest.of(SALT, tokens).position() == RollingDigest.of(SALT, changed).position()
    assert same == (changed == tokens)


def test_a_position_counts_tokens_and_looking_changes_nothing() -> None:
    state = RollingDigest(SALT)
    state.update(range(100))
    position = state.position()
    assert (position.length, len(position.digest)) == (100, DIGEST_BYTES)
    assert state.position() == position


def test_digests_of_two_tenants_have_nothing_in_common() -> None:
    tokens = list(range(100))
    one, two = RollingDigest.of(b"1" * 32, tokens), RollingDigest.of(b"2" * 32, tokens)
    assert one.position().digest != two.position().digest
    assert RollingDigest(b"1" * 32).position() != RollingDigest(b"2" * 32).position()


def test_whole_blocks_and_their_tails_are_told_apart() -> None:
    lengths = (0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS)
    digests = {RollingDigest.of(SALT, [0] * length).position().digest for length in lengths}
    assert len(digests) == len(lengths)


def test_a_copy_goes_its_own_way() -> None:
    state = RollingDigest.of(SALT, [1, 2])
    copy = state.copy()
    copy.update([3])
    assert state.position() == RollingDigest.of(SALT, [1, 2]).position()
    assert copy.position() == RollingDigest.of(SALT, [1, 2, 3]).position()


@given(TOKENS)
def test_packed_tokens_unpack(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert len(packed) == 4 * len(tokens)
    assert unpack_tokens(packed) == tokens


def test_tokens_are_packed_little_endian() -> None:
    assert pack_tokens([1, 0x01020304]) == b"\x01\x00\x00\x00\x04\x03\x02\x01"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_outside_uint32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([token])


def test_bytes_that_are_not_whole_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        unpack_tokens(b"12345")
