"""The text codec of the sim engine: every byte is a token, roles are markers no text encodes to.

A ledger reads ``BOS (role content END_OF_TURN)* ASSISTANT output END_OF_TURN …``. Tools are a line
at the end of the system message; tool calls of the history and the ids of tool results are lines
of JSON in their message, so nothing of the input is lost.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence

from workers.text.byte_vocabulary import (
    ASSISTANT,
    BOS,
    END_OF_TURN,
    SYSTEM,
    TOOL,
    USER,
    VOCAB_SIZE,
)
from workers.text.folder import OutputFolder
from workers.text.port import BadMessages, Call, ChatMessage, Folder, LastTurn, Role, Tool

ROLE_MARKERS = {
    Role.SYSTEM: SYSTEM,
    Role.USER: USER,
    Role.ASSISTANT: ASSISTANT,
    Role.TOOL: TOOL,
}


class BytesCodec:
    """Implements :class:`workers.text.port.TextCodec`."""

    token_fingerprint = hashlib.blake2b(b"sim bytes 1", digest_size=16).digest()
    eos_token_ids = (END_OF_TURN,)
    vocab_size = VOCAB_SIZE
    quick_chars = sys.maxsize
    """Virtual time knows no threads, and nothing is slow here."""

    def render(
        self, last_turn: LastTurn, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> list[int]:
        if not messages:
            raise BadMessages("a turn needs at least one message")
        _check_order(last_turn, messages)
        tokens: list[int] = []
        if last_turn is LastTurn.NONE:
            tokens.append(BOS)
            messages = _with_tools(messages, tools)
        elif last_turn is LastTurn.OPEN:
            tokens.append(END_OF_TURN)
        for message in messages:
            tokens += [ROLE_MARKERS[message.role], *_body(message).encode(), END_OF_TURN]
        tokens.append(ASSISTANT)
        return tokens

    def folder(self, stop: Sequence[str] = (), min_tokens: int = 0) -> Folder:
        return OutputFolder(token_bytes, stop, min_tokens)

    def parse_tool_calls(self, text: str, turn_id: str) -> tuple[Call, ...]:
        """None: the sim engine's output has no format for calls."""
        del text, turn_id
        return ()


def token_bytes(token_id: int) -> bytes:
    """A byte for itself, nothing for a special."""
    return bytes([token_id]) if token_id < BOS else b""


def _check_order(last_turn: LastTurn, messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        if message.role is Role.SYSTEM and (index > 0 or last_turn is not LastTurn.NONE):
            raise BadMessages("a system message can only be a session's first message")


def _with_tools(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    if not tools:
        return list(messages)
    described = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in tools
    ]
    line = "Tools: " + json.dumps(described, ensure_ascii=False)
    if messages[0].role is Role.SYSTEM:
        system = ChatMessage(Role.SYSTEM, f"{messages[0].content}\n{line}")
        return [system, *messages[1:]]
    return [ChatMessage(Role.SYSTEM, line), *messages]


def _body(message: ChatMessage) -> str:
    lines = [message.content] if message.content else []
    for call in message.tool_calls:
        shown = {"id": call.id, "name": call.name, "arguments": call.arguments}
        lines.append("Call: " + json.dumps(shown, ensure_ascii=False))
    if message.role is Role.TOOL:
        shown = {"id": message.tool_call_id, "name": message.name}
        lines.insert(0, "Result: " + json.dumps(shown, ensure_ascii=False))
    return "\n".join(lines)
