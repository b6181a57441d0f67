"""Codecs that need no model: the sim engine's, and tiny vocabularies with known templates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.conversations import now
from tests.support.tokenizers import template, write_model_folder
from workers.text.bytes_codec import BytesCodec
from workers.text.hf_codec import HfCodec, load_hf_codec
from workers.text.port import TextCodec

CODECS = ("bytes", "llama3", "qwen25", "smollm2")


def load_tiny_codec(name: str, tokenizer: str = "") -> HfCodec:
    """With the template tests/data/templates/``name``.jinja and a byte-level BPE, unless another
    ``tokenizer.json`` is given."""
    with TemporaryDirectory() as folder:
        return load_hf_codec(write_model_folder(Path(folder), template(name), tokenizer), now)


def codec(name: str, again: bool = False) -> TextCodec:
    """The codec of that name; loaded anew if ``again``."""
    return _loaded(name, int(again))


@cache
def _loaded(name: str, copy: int) -> TextCodec:
    del copy
    return BytesCodec() if name == "bytes" else load_tiny_codec(name)
