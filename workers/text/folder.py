"""The output fold: a turn's tokens to text, one token at a time.

A pure function of the tokens from the turn's first output token, so that replaying them on another
replica gives the same text at the same offsets. Two things are held back until they are decided:
the bytes of a character that has not ended yet, and text that may be the beginning of a stop
string. Nothing that was released is ever taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

TokenBytes = Callable[[int], bytes]
"""The bytes a token stands for; empty for special tokens. Must be a pure function."""

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class OutputFolder:
    """Implements :class:`workers.text.port.Folder` over any per-token byte source.

    ``stop`` strings end the text before their first character. Of several, the one that is
    complete first wins, and of those the one that began first. One that is complete before
    ``min_tokens`` tokens were pushed is ordinary text. Raises ValueError for an empty stop string.
    """

    def __init__(
        self, token_bytes: TokenBytes, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        if "" in stop:
            raise ValueError("a stop string must not be empty; leave it out instead")
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._decoder = _new_utf8_decoder("replace")
        self._held = ""
        self._pushed = 0
        self._released = 0
        self._tokens_until_stop: int | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        released: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            released.append(self._push_one(token_id))
        return "".join(released)

    def flush(self) -> str:
        if self.stopped:
            return ""
        return self._release(self._held + self._decoder.decode(b"", final=True), hold=0)

    @property
    def stopped(self) -> bool:
        return self._tokens_until_stop is not None

    @property
    def tokens_until_stop(self) -> int | None:
        return self._tokens_until_stop

    @property
    def text_length(self) -> int:
        return self._released

    def _push_one(self, token_id: int) -> str:
        self._pushed += 1
        new = self._decoder.decode(self._token_bytes(token_id))
        if not new:
            return ""
        # What is held never outgrows the longest stop string, so each search is short.
        text, undecided = self._held + new, len(self._held)
        if self._pushed >= self._min_tokens:
            begin = _first_complete(text, self._stop, undecided)
            if begin is not None:
                self._tokens_until_stop = self._pushed
                text = text[:begin]
                return self._release(text, hold=0)
        return self._release(text, hold=_possible_beginning(text, self._stop))

    def _release(self, text: str, hold: int) -> str:
        cut = len(text) - hold
        self._held = text[cut:]
        self._released += cut
        return text[:cut]


def _first_complete(text: str, stop: Sequence[str], after: int) -> int | None:
    """Where the stop string begins that is complete first, among those that end past ``after``.

    One that ends at or before it was complete with an earlier token, and was let pass there.
    """
    best: tuple[int, int] | None = None
    for candidate in stop:
        begin = text.find(candidate, max(0, after - len(candidate) + 1))
        if begin >= 0:
            found = (begin + len(candidate), begin)
            best = found if best is None else min(best, found)
    return None if best is None else best[1]


def _possible_beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a stop string, not yet complete, begins with."""
    longest = 0
    for candidate in stop:
        for length in range(min(len(candidate) - 1, len(text)), longest, -1):
            if text.endswith(candidate[:length]):
                longest = length
                break
    return longest
