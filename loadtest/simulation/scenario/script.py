"""The text of a scenario: blocks of commands with what followed them."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass

PREPOSITIONS = frozenset(("via", "as", "on", "to", "at", "of"))


class BadScript(ValueError):
    """The script cannot be read or played."""


@dataclass(frozen=True, slots=True)
class Block:
    """Comments and commands as written, and what follows them."""

    text: str
    expected: str

    @property
    def commands(self) -> list[str]:
        lines = (line.strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def parse(text: str) -> list[Block]:
    """The blocks of a script."""
    blocks: list[Block] = []
    lines = iter(text.splitlines())
    head: list[str] = []
    for line in lines:
        if line != "----":
            head.append(line)
            continue
        expected = list(itertools.takewhile(str.strip, lines))
        blocks.append(Block("\n".join(head).strip("\n"), "\n".join(expected)))
        head = []
    if any(line.strip() for line in head):
        raise BadScript(f"no ---- after {head!r}")
    return blocks


def render(blocks: list[Block], outputs: list[str]) -> str:
    """The script with other outputs."""
    parts = [f"{b.text}\n----\n{out}\n" for b, out in zip(blocks, outputs, strict=True)]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Command:
    """``verb words… [preposition word]… [key=value]… [&]``."""

    verb: str
    words: tuple[str, ...]
    options: dict[str, str]
    background: bool

    @classmethod
    def of(cls, line: str) -> Command:
        verb, *rest = shlex.split(line)
        background = rest[-1:] == ["&"]
        words: list[str] = []
        options: dict[str, str] = {}
        parts = iter(rest[:-1] if background else rest)
        for part in parts:
            key, equals, value = part.partition("=")
            if part in PREPOSITIONS:
                options[part] = next(parts)
            elif equals:
                options[key] = value
            else:
                words.append(part)
        return cls(verb, tuple(words), options, background)
