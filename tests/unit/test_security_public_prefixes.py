"""Public prefixes: which pages they make public, and what of a session's names depends on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from statestore.digest import RollingDigest, pack_tokens
from workers.engines.registry import Backend, create_backend
from workers.kv import blocks
from workers.kv.blocks import PublicPages, block_hashes, page_name
from workers.public_prefixes import PublicPrefix, declare, load_prefixes
from workers.residency import ResidentSession
from workers.text.port import ChatMessage, LastTurn, Role, Tool

FINGERPRINT = b"f" * 16
PAGE = 4
DRAW = random.Random(3)
PREFIX = [DRAW.randrange(9) for _ in range(5 * PAGE)]
SYSTEM = ChatMessage(Role.SYSTEM, "You are a careful assistant. " * 30)


def backend(**options: str) -> Backend:
    return create_backend("sim", options, lambda: 0.0)


def declared(*prefixes: Sequence[int]) -> PublicPages:
    public = PublicPages()
    for prefix in prefixes:
        public.declare(FINGERPRINT, prefix, PAGE)
    return public


def names(tokens: Sequence[int], salt: bytes, public: PublicPages) -> list[bytes]:
    return block_hashes(FINGERPRINT, salt, tokens, PAGE, public)


def test_without_a_declaration_names_are_what_they_were() -> None:
    chained, previous = [], blocks.root_hash(FINGERPRINT, b"salt")
    for start in range(0, len(PREFIX), PAGE):
        previous = blocks.next_hash(previous, pack_tokens(PREFIX[start : start + PAGE]))
        chained.append(previous)
    assert names(PREFIX, b"salt", PublicPages()) == chained
    elsewhere = declared([11] * 8)
    assert names(PREFIX, b"salt", elsewhere) == chained, "another prefix changes nothing"


def test_only_whole_pages_within_the_prefix_are_public() -> None:
    public = declared(PREFIX[:-1])
    tokens = [*PREFIX, *([7] * 9)]
    ours, theirs = names(tokens, b"a", public), names(tokens, b"b", public)
    assert ours[:4] == theirs[:4]
    assert set(ours[4:]).isdisjoint(theirs[4:])
    assert set(ours[:4]) == public.names


def test_a_name_depends_on_nothing_behind_its_page() -> None:
    public = declared(PREFIX, PREFIX[: 2 * PAGE] + [9] * PAGE)
    for _ in range(200):
        cut = DRAW.randrange(len(PREFIX))
        tokens = PREFIX[:cut] + [DRAW.randrange(10) for _ in range(20)]
        whole = names(tokens, b"salt", public)
        for length in range(len(tokens)):
            assert names(tokens[:length], b"salt", public) == whole[: length // PAGE]


def test_the_public_part_does_not_begin_anew_behind_a_private_page() -> None:
    public = declared(PREFIX)
    tokens = [8] * PAGE + PREFIX
    assert set(names(tokens, b"a", public)).isdisjoint(names(tokens, b"b", public))


def test_a_resident_session_names_its_pages_as_the_engine_does() -> None:
    it = backend()
    info = it.engine.info
    prefix = [DRAW.randrange(3, 200) for _ in range(5 * info.page_size)]
    info.public.declare(info.kv_fingerprint, prefix, info.page_size)
    tokens = prefix + [DRAW.randrange(3, 200) for _ in range(3 * info.page_size + 1)]
    session = ResidentSession("s", b"salt", RollingDigest(b"salt"))
    for start in range(0, len(tokens), 7):  # it grows, in pieces that are no pages
        session.extend(tokens[start : start + 7])
        so_far = tokens[: start + 7]
        assert session.block_hashes(info) == it.engine.block_hashes(b"salt", so_far)
        more = session.block_hashes_with(info, tokens[start + 7 :])
        assert more == it.engine.block_hashes(b"salt", tokens)


def test_first_pages_and_later_ones_are_named_by_one_rule() -> None:
    public, previous, found = declared(PREFIX), None, []
    for start in range(0, len(PREFIX), PAGE):
        page = pack_tokens(PREFIX[start : start + PAGE])
        previous = page_name(FINGERPRINT, b"salt", public, previous, page)
        found.append(previous)
    assert found == names(PREFIX, b"salt", public)


def test_the_pages_of_all_prefixes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_PUBLIC_PAGES", 6)
    public = declared(PREFIX)
    public.declare(FINGERPRINT, PREFIX, PAGE)
    with pytest.raises(ValueError, match="at most 6"):
        public.declare(FINGERPRINT, [9] * 2 * PAGE, PAGE)
    assert len(public.names) == 5


def test_a_prefix_is_what_every_session_with_it_begins_with() -> None:
    codec = backend().codec
    tools = (Tool("search", "Searches.", '{"type": "object"}'),)
    for prefix in (PublicPrefix((SYSTEM,)), PublicPrefix((SYSTEM,), tools)):
        tokens = prefix.tokens(codec)
        assert len(tokens) > len(SYSTEM.content) // 2
        for text in ("Hello", "", "A", "You are"):
            user = ChatMessage(Role.USER, text)
            rendered = codec.render(LastTurn.NONE, [SYSTEM, user], list(prefix.tools))
            assert rendered[: len(tokens)] == tokens


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "1 to 64"),
        ("prefixes = []", "1 to 64"),
        ("[[prefixes]]\n[other]", "1 to 64"),
        ("[[prefixes", "no file of prefixes"),
        ("[[prefixes]]\nmessages = []", "is empty"),
        ("[[prefixes]]\ntext = 'x'", "nothing else"),
        ("[[prefixes]]\nmessages = [{role = 'system'}]", "each has role, content"),
        ("[[prefixes]]\nmessages = [{role = 'system', content = 3}]", "text"),
        ("[[prefixes]]\nmessages = [{role = 'boss', content = ''}]", "role is system"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "prefixes.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        load_prefixes(file)


def test_a_file_and_what_it_makes_public(tmp_path: Path) -> None:
    file = tmp_path / "prefixes.toml"
    file.write_text(
        f"[[prefixes]]\nmessages = [{{role = 'system', content = '{SYSTEM.content}'}}]\n"
        "[[prefixes.tools]]\nname = 'f'\ndescription = 'd'\nparameters = '{}'\n"
    )
    it = backend()
    (prefix,) = load_prefixes(file)
    assert prefix == PublicPrefix((SYSTEM,), (Tool("f", "d", "{}"),))
    whole = len(prefix.tokens(it.codec)) // it.engine.info.page_size
    assert declare([prefix], it.engine.info, it.codec) == whole > 10
