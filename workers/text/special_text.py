"""Keeps special tokens out of the reach of user text, without changing how harmless text tokenises.

A rendered prompt is one string in which the template's special tokens and the user's text look
alike. So the strings that come from outside are *marked* before rendering: a mark, a character that
occurs in none of them, is put inside every special token that the text spells, and at an edge of
the text that could spell one together with what the template writes beside it. After rendering,
the marks that do stand inside a special token become borders between pieces that are tokenised
apart; all other marks vanish. No piece spells a special token except those of the template itself,
and text that spells none is tokenised exactly as in a plain render.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from workers.text.port import BadMessages

# Unicode's noncharacters are for a program's own use; text has no business with them.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_ANY_MARK = re.compile("[\ufdd0-\ufdef]")


class SpecialText:
    """The special tokens of one model, by the text that spells them.

    ``tokens`` maps that text to the token id. Those of one character are left out by the caller:
    there is no inside to put a mark.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._ids = dict(tokens)
        self._guarded_ids = frozenset(tokens.values())
        self._longest = max(map(len, tokens), default=0)
        # As tokenizers do: the leftmost match, and of those the longest.
        names = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
        self._written = re.compile(names)
        self._everywhere = re.compile(f"(?=({names}))")
        self._beginnings = {name[:cut] for name in tokens for cut in range(1, len(name))}
        self._ends = {name[cut:] for name in tokens for cut in range(1, len(name))}

    def first(self, text: str, after: int) -> re.Match[str] | None:
        """The first special token that ``text`` spells from ``after`` on."""
        return self._written.search(text, after)

    def mark(self, value: Any, mark: str) -> Any:
        """A copy of JSON-like ``value`` with its strings, keys included, marked."""
        if isinstance(value, str):
            return self._mark_text(value, mark)
        if isinstance(value, Mapping):
            return {self.mark(key, mark): self.mark(item, mark) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.mark(item, mark) for item in value]
        return value

    def pieces(self, rendered: str, mark: str) -> list[str]:
        """The rendered text without marks, cut so that no piece spells a special token that the
        template did not write."""
        parts = rendered.split(mark)
        text = "".join(parts)
        inside = [at for at in accumulate(map(len, parts[:-1])) if self._is_inside(text, at)]
        borders = [0, *inside, len(text)]
        return [text[a:b] for a, b in pairwise(borders) if a < b]

    def check(self, rendered: str, token_ids: Iterable[int]) -> None:
        """Raises BadMessages unless the special tokens are those written in the marked text.

        They always are, unless a tokenizer normalises text into one.
        """
        written = [self._ids[match[0]] for match in self._written.finditer(rendered)]
        if [token for token in token_ids if token in self._guarded_ids] != written:
            raise BadMessages(
                "the text would encode special tokens of the model; remove what spells them"
            )

    def _mark_text(self, text: str, mark: str) -> str:
        at = {match.start() + 1 for match in self._everywhere.finditer(text)}
        # Templates may strip white space, so the edge is where the visible text begins and ends.
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        reach = range(1, min(self._longest, end - begin + 1))
        if any(text[begin : begin + length] in self._ends for length in reach):
            at.add(begin)
        if any(text[end - length : end] in self._beginnings for length in reach):
            at.add(end)
        borders = [0, *sorted(at), len(text)]
        return mark.join(text[a:b] for a, b in pairwise(borders))

    def _is_inside(self, text: str, at: int) -> bool:
        first = max(0, at - self._longest + 1)
        near = text[first : at + self._longest - 1]
        return any(
            first + match.start() < at < first + match.end(1)
            for match in self._everywhere.finditer(near)
        )


def unused_mark(values: Iterable[Any]) -> str:
    """A mark that occurs in no string of these JSON-like values. Raises BadMessages if all do."""
    used: set[str] = set()
    _each_text(values, lambda text: used.update(_ANY_MARK.findall(text)))
    for mark in _MARKS:
        if mark not in used:
            return mark
    raise BadMessages("the text contains every noncharacter from U+FDD0 to U+FDEF; remove them")


def _each_text(value: Any, visit: Callable[[str], None]) -> None:
    if isinstance(value, str):
        visit(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            visit(key)
            _each_text(item, visit)
    elif isinstance(value, Iterable):
        for item in value:
            _each_text(item, visit)
