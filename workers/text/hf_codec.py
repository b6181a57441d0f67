"""The text codec of a Hugging Face model folder.

Reads ``tokenizer.json``, the chat template (``chat_template.jinja`` or in
``tokenizer_config.json``) and the end-of-sequence tokens; needs neither weights nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from workers.text.folder import OutputFolder
from workers.text.hf_template import ChatTemplate
from workers.text.port import (
    BadMessages,
    Call,
    ChatMessage,
    Folder,
    LastTurn,
    Role,
    TemplateRefused,
    Tool,
)
from workers.text.rendering import (
    Json,
    TemplateShape,
    later_turn,
    template_messages,
    template_tool,
)
from workers.text.special_text import SpecialText, unused_mark
from workers.text.template_probe import probe
from workers.text.token_bytes import byte_table
from workers.text.tool_calls import MARKS, parser_for

CODEC_VERSION = 2
"""Part of the token fingerprint; grows whenever the same messages would give other tokens, or the
same tokens other text."""


def load_hf_codec(folder: Path, now: Callable[[], datetime]) -> HfCodec:
    """The codec of the model in ``folder``; ``now`` is for templates that write the date.

    Raises TemplateRefused if a file is missing or the model cannot be served turn by turn.
    """
    tokenizer_json = _read_json(folder / "tokenizer.json")
    if tokenizer_json is None:
        raise TemplateRefused(
            f"{folder} has no tokenizer.json; convert the model's tokenizer with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    config = _read_json(folder / "tokenizer_config.json") or {}
    source = _template_source(folder, config)
    names = {
        name: value["content"] if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | Mapping)
    }
    added = {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    stops = [added[names["eos_token"]]] if names.get("eos_token") in added else []
    for file in ("generation_config.json", "config.json"):
        stop = (_read_json(folder / file) or {}).get("eos_token_id")
        stops += stop if isinstance(stop, list) else [] if stop is None else [stop]
    return HfCodec(tokenizer_json, source, names, stops, now)


class HfCodec:
    """Implements :class:`workers.text.port.TextCodec`. Immutable, so safe to share between threads.

    :meth:`render` takes about 30 ms per 10,000 tokens.
    """

    quick_chars = 4096
    """About 3 ms."""

    def __init__(
        self,
        tokenizer_json: Mapping[str, Any],
        template: str,
        special_tokens: Mapping[str, str],
        stop_token_ids: Sequence[int],
        now: Callable[[], datetime],
    ) -> None:
        self._tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = ChatTemplate(template, special_tokens, now)
        # Besides special tokens, text must not spell those that the template itself writes (such
        # as Qwen's <tool_call>), except an assistant's: they may be part of what a model wrote.
        added = [token for token in tokenizer_json["added_tokens"] if len(token["content"]) > 1]
        special = {token["content"]: token["id"] for token in added if token["special"]}
        control = {
            token["content"]: token["id"]
            for token in added
            if token["content"].strip() and token["content"] in template
        }
        self._special = SpecialText(special)
        self._guarded = SpecialText(special | control)
        # The date must not change between two renders that are compared.
        loaded_at = now()
        still = ChatTemplate(template, special_tokens, lambda: loaded_at)
        self._shape = probe(still.render, self._guarded)
        self._end_of_turn = (special | control)[self._shape.end_of_turn]
        self._closing = self._encode(self._shape.before_end + self._shape.end_of_turn)
        self._stops = tuple(dict.fromkeys([self._end_of_turn, *stop_token_ids]))
        self._parse = parser_for(template)
        silent = frozenset(self._stops)
        marks = {it["id"]: it["content"].encode() for it in added if it["content"] in MARKS}
        self._bytes = tuple(
            b"" if token_id in silent else marks.get(token_id, data)
            for token_id, data in enumerate(byte_table(tokenizer_json))
        )
        self._fingerprint = _fingerprint(tokenizer_json, template, special_tokens, self._stops)

    @property
    def token_fingerprint(self) -> bytes:
        return self._fingerprint

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._stops

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def shape(self) -> TemplateShape:
        """What was found out about the template. One that does not render definitions of tools
        (SmolLM2's) ignores them: describe them in the system message."""
        return self._shape

    def render(
        self, last_turn: LastTurn, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> list[int]:
        _refuse_misplaced(last_turn, messages)
        rendered = template_messages(messages, self._shape)
        offered = last_turn is LastTurn.NONE and self._shape.tools
        definitions = [template_tool(tool) for tool in tools] if offered else []
        mark = unused_mark([rendered, definitions])
        marked = [self._mark(message, mark) for message in rendered]
        if last_turn is LastTurn.NONE:
            marked_tools = self._guarded.mark(definitions, mark) or None
            return self._encode(self._template.render(marked, marked_tools), mark)
        text = later_turn(self._template.render, self._shape, marked)
        new = self._encode(text, mark, after_end_of_turn=True)
        return new if last_turn is LastTurn.CLOSED else [*self._closing, *new]

    def folder(self, stop: Sequence[str] = (), min_tokens: int = 0) -> Folder:
        return OutputFolder(self._token_bytes, stop, min_tokens)

    def parse_tool_calls(self, text: str, turn_id: str) -> tuple[Call, ...]:
        return self._parse(text, turn_id) if self._parse else ()

    def _token_bytes(self, token_id: int) -> bytes:
        # Models pad their vocabulary; such ids can be sampled but stand for nothing.
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def _mark(self, message: Json, mark: str) -> Json:
        marked = {key: self._guarded.mark(value, mark) for key, value in message.items()}
        if message["role"] == Role.ASSISTANT:
            marked["content"] = self._special.mark(message["content"], mark)
        return {**marked, "role": message["role"]}

    def _encode(
        self, text: str, mark: str = "\ufdd0", after_end_of_turn: bool = False
    ) -> list[int]:
        token_ids: list[int] = []
        for index, piece in enumerate(self._guarded.pieces(text, mark)):
            if index or after_end_of_turn:
                # Some tokenizers treat the beginning of a text unlike its middle; this is middle.
                piece = self._shape.end_of_turn + piece
                token_ids += self._tokenizer.encode(piece, add_special_tokens=False).ids[1:]
            else:
                token_ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        self._guarded.check(text, token_ids)
        return token_ids


def _refuse_misplaced(last_turn: LastTurn, messages: Sequence[ChatMessage]) -> None:
    if not messages:
        raise BadMessages("a turn needs at least one message")
    leading = 1 if last_turn is LastTurn.NONE else 0
    if any(message.role is Role.SYSTEM for message in messages[leading:]):
        raise BadMessages("a system message must be the first message of the session")


def _template_source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise TemplateRefused(f"{folder} has no chat template; add a chat_template.jinja")
    return template


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def _fingerprint(*parts: Any) -> bytes:
    """Over the meaning of the files, not over how they are laid out."""
    text = json.dumps([CODEC_VERSION, *parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"token-space").digest()
