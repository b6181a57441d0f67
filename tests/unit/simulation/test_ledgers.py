"""Heads of ledgers: the digest is that of the product, computed in other words, and a head of other
tokens is told."""

from __future__ import annotations

import pytest

from loadtest.simulation.checkers.ledgers import Ledgers, digest_of
from statestore.digest import RollingDigest, pack_tokens
from statestore.keys import ledger_key, salt_key

SALT = b"salt"
TOKENS = [7 * index for index in range(150)]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 150])
def test_the_digest_is_that_of_the_ledger(length: int) -> None:
    state = RollingDigest(SALT)
    for token in TOKENS[:length]:
        state.update([token])
    assert digest_of(SALT, pack_tokens(TOKENS[:length])) == state.position().digest


def test_the_digest_is_of_salt_and_every_token() -> None:
    whole = digest_of(SALT, pack_tokens(TOKENS))
    assert digest_of(b"pepper", pack_tokens(TOKENS)) != whole
    assert digest_of(SALT, pack_tokens([1, *TOKENS[1:]])) != whole
    assert digest_of(SALT, pack_tokens([*TOKENS[:-1], 1])) != whole


STORED = {
    salt_key("t"): SALT,
    ledger_key("ses_f"): pack_tokens(TOKENS[:100]),
    ledger_key("ses_f.b"): pack_tokens(TOKENS[70:]),
}
FORK = {
    b"tenant": b"t",
    b"length": b"150",
    b"digest": digest_of(SALT, pack_tokens(TOKENS)),
    b"segments": b"ses_f:0:70:0:1",
}
ROOT = {
    **FORK,
    b"length": b"100",
    b"digest": digest_of(SALT, pack_tokens(TOKENS[:100])),
    b"segments": b"",
}


@pytest.mark.parametrize(("session_id", "record"), [("ses_f", ROOT), ("ses_f.b", FORK)])
def test_a_right_head_is_right(session_id: str, record: dict[bytes, bytes]) -> None:
    assert Ledgers(STORED.get).judge(session_id, record) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {b"length": b"149"},
        {b"digest": digest_of(SALT, pack_tokens(TOKENS[:149]))},
        {b"tenant": b"other"},
        {b"segments": b"ses_f:0:69:0:1"},
        {b"segments": b""},
    ],
    ids=["length", "digest", "salt", "segment", "no ancestor"],
)
def test_a_head_of_other_tokens_is_told(wrong: dict[bytes, bytes]) -> None:
    (what,) = Ledgers(STORED.get).judge("ses_f.b", {**FORK, **wrong})
    assert what.startswith("P1: ")
