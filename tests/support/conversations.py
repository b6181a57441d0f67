"""Conversations for rendering tests, and what a ledger makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from tokenizers import Tokenizer

from workers.text.hf_codec import HfCodec
from workers.text.hf_template import ChatTemplate
from workers.text.port import ChatMessage, LastTurn, Role, Tool
from workers.text.rendering import template_messages, template_tool

NOW = datetime(2026, 3, 1, 12)


def now() -> datetime:
    return NOW


def system(text: str) -> ChatMessage:
    return ChatMessage(Role.SYSTEM, text)


def user(text: str) -> ChatMessage:
    return ChatMessage(Role.USER, text)


def assistant(text: str) -> ChatMessage:
    return ChatMessage(Role.ASSISTANT, text)


def result(text: str, call_id: str = "call_1", name: str = "get_flight") -> ChatMessage:
    return ChatMessage(Role.TOOL, text, tool_call_id=call_id, name=name)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn: what is new, and how the model answers it."""

    new: tuple[ChatMessage, ...]
    reply: str
    closed: bool = True
    """The model ended its reply itself."""


@dataclass(frozen=True, slots=True)
class Model:
    """A codec beside the plain way to do the same: render everything, tokenise everything."""

    codec: HfCodec
    template: ChatTemplate
    tokenizer: Tokenizer

    def render_everything(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()
    ) -> tuple[str, list[int]]:
        definitions = [template_tool(tool) for tool in tools] if self.codec.shape.tools else []
        text = self.template.render(
            template_messages(messages, self.codec.shape), definitions or None
        )
        return text, self.tokenize(text)

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def ledger(
        self, exchanges: Sequence[Exchange], tools: Sequence[Tool] = ()
    ) -> list[tuple[list[int], list[int]]]:
        """Per turn: the whole ledger up to its generation prompt, and what the turn appended."""
        ledger: list[int] = []
        turns: list[tuple[list[int], list[int]]] = []
        last = LastTurn.NONE
        for exchange in exchanges:
            new = self.codec.render(last, exchange.new, tools)
            ledger = [*ledger, *new]
            turns.append((ledger, new))
            end = [self.codec.eos_token_ids[0]] if exchange.closed else []
            ledger = [*ledger, *self.tokenize(exchange.reply), *end]
            last = LastTurn.CLOSED if exchange.closed else LastTurn.OPEN
        return turns


GET_FLIGHT = Tool(
    "get_flight",
    "Looks up a flight by its number.",
    '{"type": "object", "properties": {"number": {"type": "string", "title": "e.g. HAT001"}}, '
    '"required": ["number"]}',
)

_CALL = '<tool_call>\n{"name": "get_flight", "arguments": {"number": "HAT%03d"}}\n</tool_call>'

# An agent's day: a policy, questions, calls, results of every shape, interruptions.
AIRLINE = (
    Exchange(
        (
            system("# Policy\n\nYou book **flights**.\n\n- Ask first.\n- One call at a time.\n"),
            user("Hi, I'd like to change my return flight of 2024-05-21, please."),
        ),
        "Happy to help! What is your *reservation number*?",
    ),
    Exchange((user("It's XEWRD9   (I think)."),), _CALL % 30),
    Exchange(
        (result('{"number": "HAT030", "price": 92.5, "seats": {"economy": 0}, "via": null}'),),
        _CALL % 31,
    ),
    Exchange(
        (result("Error: flight not found"), result("")), "Neither is available,", closed=False
    ),
    Exchange((user("you stopped. And?"),), "Sorry! Nothing is left on that day. \U0001f614"),
    Exchange((user("Dann über Köln — 世界?\n\n\n\tdanke"),), "Leider nein."),
    Exchange((user("ok"),), ""),
)

CODING = (
    Exchange(
        (user("Fix this:\n```python\ndef f(x):\n    return  x+1\n```\n"),),
        'Use `a < b` and `"<html>"`:\n\n```python\ndef f(x: int) -> int:\n    return x + 1\n```',
    ),
    Exchange((user("  leading and trailing  "),), "1. one\n2. two\n"),
    Exchange((user("<|not special|> <| im_end |> </s"),), "fine"),
    Exchange((user("[INST] 1234567890 [/INST]"),), "0.5 + 0.25 = 0.75", closed=False),
    Exchange((user("\u200b\ufeff e\u0301 é ﬁ"),), "…"),
)

CHAT = tuple(
    Exchange((user(f"Question {index}?"),), f"Answer {index}.", closed=index % 3 != 1)
    for index in range(12)
)

CONVERSATIONS = {"airline": AIRLINE, "coding": CODING, "chat": CHAT}


def without_tools(exchanges: Sequence[Exchange]) -> tuple[Exchange, ...]:
    """The same for a template that knows neither tool nor system messages, nor two in a row."""
    plain: list[Exchange] = []
    for exchange in exchanges:
        text = "\n".join(message.content for message in exchange.new)
        plain.append(Exchange((user(text),), exchange.reply, exchange.closed))
    return tuple(plain)
