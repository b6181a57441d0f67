"""The exact bytes each token stands for, from a parsed ``tokenizer.json``.

Decoding token by token to text loses characters that are split between tokens; bytes do not. Two
families of tokenizers keep them: byte-level BPE (GPT-2's printable alphabet for the 256 bytes) and
SentencePiece-like ones ("▁" for a space, ``<0xAB>`` for a byte outside the vocabulary).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from workers.text.port import TemplateRefused

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_table(tokenizer: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Bytes by token id; empty for special tokens and for ids the tokenizer does not use.

    Raises TemplateRefused for a tokenizer whose tokens have no exact bytes (such as WordPiece).
    """
    decode = _token_decoder(tokenizer)
    vocab = tokenizer["model"]["vocab"]
    # Unigram lists (token, score) pairs in the order of their ids; the others map token to id.
    ids: Mapping[str, int] = (
        vocab
        if isinstance(vocab, Mapping)
        else {token: index for index, (token, _score) in enumerate(vocab)}
    )
    table = {token_id: decode(token) for token, token_id in ids.items()}
    for added in tokenizer.get("added_tokens") or ():
        table[added["id"]] = b"" if added["special"] else added["content"].encode()
    return tuple(table.get(token_id, b"") for token_id in range(max(table) + 1))


def _token_decoder(tokenizer: Mapping[str, Any]) -> Callable[[str], bytes]:
    decoder = tokenizer.get("decoder") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    if "ByteLevel" in steps:
        return _byte_level
    if steps & {"ByteFallback", "Metaspace", "Replace"}:
        return _sentencepiece
    raise TemplateRefused(
        f"the tokenizer decodes by {sorted(steps) or 'nothing'}, which gives no exact bytes for a "
        "token; use a model with a byte-level or SentencePiece-like tokenizer"
    )


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:
        return token.encode()  # not written in the alphabet, so it stands for itself


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
