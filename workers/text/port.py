"""Text on the outside, tokens on the inside: what a replica needs to turn one into the other.

Tokens enter a ledger once and are never rendered or tokenised again, so a codec renders only what
is new and only appends. Output text is a pure fold over a turn's tokens from its first output
token; replaying the same tokens gives the same text and the same offsets.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TextError(Exception):
    """Base of the codec's failures."""


class TemplateRefused(TextError):
    """The model's template cannot be rendered incrementally (probed when it is loaded)."""


class BadMessages(TextError):
    """The messages cannot be rendered (for instance a system message in the middle)."""


class Role(enum.StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; ``arguments`` is JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is JSON Schema text."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message, as text."""

    role: Role
    content: str
    tool_calls: tuple[Call, ...] = ()
    tool_call_id: str = ""
    name: str = ""


class LastTurn(enum.Enum):
    """What the ledger ends with; decides what must be written to close the last turn."""

    NONE = enum.auto()
    """The ledger is empty: this is the first turn."""
    CLOSED = enum.auto()
    """The last output token is the model's end-of-turn token."""
    OPEN = enum.auto()
    """The last turn ended without it (length, stop string, cancel, failure)."""


class Folder(Protocol):
    """Incremental detokeniser of one turn's output. Deterministic in its tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text released by these tokens. Holds back half characters and possible beginnings of a
        stop string. After a stop string was found it releases nothing more."""
        ...

    def flush(self) -> str:
        """What was held back (broken characters become U+FFFD); call once, at the end of a turn."""
        ...

    @property
    def stopped(self) -> bool:
        """A stop string was found (never before ``min_tokens`` tokens); the text ends before it."""
        ...

    @property
    def tokens_until_stop(self) -> int | None:
        """How many tokens had been pushed when the stop string was complete; None before that."""
        ...

    @property
    def text_length(self) -> int:
        """Code points released so far."""
        ...


class TextCodec(Protocol):
    """One model's tokenizer and template."""

    @property
    def token_fingerprint(self) -> bytes:
        """Over tokenizer and template (16 bytes): gates whether a session may continue here."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def quick_chars(self) -> int:
        """Up to so many characters are rendered fast enough to do it on the event loop. A codec
        that gives a bound can be called from any thread."""
        ...

    def render(
        self,
        last_turn: LastTurn,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
    ) -> list[int]:
        """Tokens to append for a new turn: what closes the last turn, the new messages, and the
        generation prompt. With ``LastTurn.NONE`` the messages include the session's leading ones,
        and ``tools`` are rendered (later turns ignore them: they are in the ledger). User text
        never becomes special tokens. Raises BadMessages."""
        ...

    def folder(self, stop: Sequence[str] = (), min_tokens: int = 0) -> Folder:
        """A detokeniser for one turn; special tokens give no text, unless they mark tool calls."""
        ...

    def parse_tool_calls(self, text: str, turn_id: str) -> tuple[Call, ...]:
        """Tool calls in a turn's output text, if the model's format is known; ids are derived from
        ``turn_id`` and the call's index."""
        ...
