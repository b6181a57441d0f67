"""Tiny tokenizers in the form of Hugging Face model folders, for tests without a model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<start_of_turn>", "<end_of_turn>",
    "<s>", "</s>",
]  # fmt: skip
CONTROL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>"]
"""Added tokens that are not special, as in Qwen's tokenizers."""

_CORPUS = [
    "The user asks the assistant about a flight; the assistant calls a tool and gives an answer.",
    "<|im_start|>user <|im_end|> system assistant tool response function name arguments",
    "Grüße aus Köln, naïve, 世界 你好 👋 once and again, line\nbreaks\n\nand  spaces 2024-05-15",
]


def template(name: str) -> str:
    """The text of tests/data/templates/``name``.jinja."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def byte_level_tokenizer() -> str:
    """``tokenizer.json`` of a byte-level BPE with about 500 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    return tokenizer.to_str()


@cache
def sentencepiece_tokenizer() -> str:
    """``tokenizer.json`` of a BPE with "▁" for a space and byte fallback, as in Llama 2."""
    vocab: dict[str, int] = {}
    for token in ("<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))):
        vocab[token] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyzABCHISTW\n.:,'<>|[]/_":
        vocab.setdefault(char, len(vocab))
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("u", "s"), ("▁", "us")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False) for text in ("<unk>", *SPECIAL)]
    )
    return tokenizer.to_str()


@cache
def stripping_tokenizer() -> str:
    """One whose special tokens swallow the white space after them, as Phi-3's do."""
    value: dict[str, Any] = json.loads(byte_level_tokenizer())
    for token in value["added_tokens"]:
        token["rstrip"] = token["special"]
    return json.dumps(value)


@cache
def normalising_tokenizer() -> str:
    """One that normalises full-width characters before it looks for special tokens."""
    value: dict[str, Any] = json.loads(byte_level_tokenizer())
    value["normalizer"] = json.loads(_with_nfkc())["normalizer"]
    for token in value["added_tokens"]:
        token["normalized"] = True
    return json.dumps(value)


def _with_nfkc() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer.to_str()


def write_model_folder(
    folder: Path, chat_template: str, tokenizer: str = "", eos_token: str = "<|im_end|>"
) -> Path:
    """A folder that a codec can be loaded from; byte-level unless a tokenizer is given."""
    (folder / "tokenizer.json").write_text(tokenizer or byte_level_tokenizer(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    begin = {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": eos_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
