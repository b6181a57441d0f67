"""Prefixes that an operator declares public: leading messages whose KV all tenants may share.

A system prompt that everybody has is computed once then, and not once for each tenant. What is in
the file is no secret any more: whoever may open sessions can find out, by its time, that a replica
has it. What follows it stays the tenant's own.

    [[prefixes]]
    messages = [{ role = "system", content = "You are a careful assistant." }]
    tools = [{ name = "search", description = "Searches.", parameters = '{"type": "object"}' }]
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.engines.port import EngineInfo
from workers.text.port import BadMessages, ChatMessage, LastTurn, Role, TextCodec, Tool

MAX_PREFIXES = 64
MAX_FILE_BYTES = 8 << 20
ENGINES = frozenset({"sim", "torch"})
"""Engines that name their pages as ``workers/kv/blocks.py`` does; others share by rules of their
own."""
_PROBES = ("A", "b")
"""Two first messages of users: what comes out the same before both is the prefix."""


@dataclass(frozen=True, slots=True)
class PublicPrefix:
    """Leading messages and tools, as sessions are opened with."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()

    def tokens(self, codec: TextCodec) -> list[int]:
        """Tokens that every session with these messages and tools begins with. Raises
        BadMessages."""
        first, second = (
            codec.render(
                LastTurn.NONE, [*self.messages, ChatMessage(Role.USER, text)], list(self.tools)
            )
            for text in _PROBES
        )
        shared = 0
        while shared < min(len(first), len(second)) and first[shared] == second[shared]:
            shared += 1
        return first[:shared]


def load_prefixes(path: Path) -> tuple[PublicPrefix, ...]:
    """Raises OSError, ValueError saying what is wrong."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of prefixes: {error}") from error
    tables = content.pop("prefixes", None)
    if content or not isinstance(tables, list) or not 0 < len(tables) <= MAX_PREFIXES:
        raise ValueError(f"{path} holds 1 to {MAX_PREFIXES} [[prefixes]] and nothing else")
    return tuple(_prefix(table, f"{path}, prefix {n}") for n, table in enumerate(tables, 1))


def declare(prefixes: Sequence[PublicPrefix], info: EngineInfo, codec: TextCodec) -> int:
    """Makes the prefixes public on an engine that has not started yet; returns the number of pages
    that all tenants share. Raises ValueError."""
    if info.engine not in ENGINES:
        raise ValueError(
            f"the engine {info.engine} cannot share pages between tenants; only "
            f"{' and '.join(sorted(ENGINES))} can: leave public_prefixes out"
        )
    for number, prefix in enumerate(prefixes, 1):
        try:
            tokens = prefix.tokens(codec)
        except BadMessages as error:
            raise ValueError(f"public prefix {number} cannot be rendered: {error}") from error
        info.public.declare(info.kv_fingerprint, tokens, info.page_size)
    return len(info.public.names)


def _prefix(table: Any, where: str) -> PublicPrefix:
    if not isinstance(table, dict) or set(table) - {"messages", "tools"}:
        raise ValueError(f"{where} has messages, perhaps tools, and nothing else")
    messages = [
        ChatMessage(_role(values["role"], where), values["content"])
        for values in _tables(table.get("messages"), ("role", "content"), f"{where}, messages")
    ]
    tools = [
        Tool(values["name"], values["description"], values["parameters"])
        for values in _tables(
            table.get("tools", []), ("name", "description", "parameters"), f"{where}, tools"
        )
    ]
    if not messages and not tools:
        raise ValueError(f"{where} is empty: it would be no prefix")
    return PublicPrefix(tuple(messages), tuple(tools))


def _tables(value: Any, names: Sequence[str], where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of tables")
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != set(names):
            raise ValueError(f"{where}: each has {', '.join(names)}")
        if not all(isinstance(text, str) for text in entry.values()):
            raise ValueError(f"{where}: all values are text")
    return value


def _role(name: str, where: str) -> Role:
    if name not in tuple(Role):
        raise ValueError(f"{where}: role is {', '.join(Role)}, not {name!r}")
    return Role(name)
