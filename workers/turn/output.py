"""A turn's output as a pure fold over its tokens: text, offsets, digests, and when it ends.

Nothing here waits or writes. The same tokens give the same text, the same offsets and the same
finish, on whichever replica they are folded (P17), so a run continued elsewhere, a replay from the
ledger and a transcript all come from this one class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sessile.v1 import types_pb2 as pb

from statestore.digest import RollingDigest
from statestore.records import FinishReason, Position
from workers.text.port import Folder

MAX_TOKENS_PER_EVENT = 4096
"""A larger backlog is sent as several events."""


@dataclass(frozen=True, slots=True)
class FinishRules:
    """When output ends by itself. ``max_tokens`` >= 1 already fits the model's context."""

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]


class TurnOutput:
    """Output tokens of one turn from its first one. Grows by :meth:`push`; :meth:`seal` marks the
    places at which the ledger is written; :meth:`end` closes the text."""

    def __init__(
        self, start: RollingDigest, new_folder: Callable[[], Folder], rules: FinishRules
    ) -> None:
        """``start`` is the digest state before the first output token (copied)."""
        self._start = start.copy()
        self._digest = start.copy()
        self._new_folder = new_folder
        self._folder = new_folder()
        self._rules = rules
        self._pieces: list[str] = []
        self._ends = [0]
        self._sealed = [0]
        self._sealed_digests = [self._start.position().digest]
        self._tail: str | None = None
        self.start = self._start.position()
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        """Set when the fold says that output ends here (STOP or LENGTH)."""

    def push(self, tokens: Sequence[int]) -> None:
        """Folds tokens in; those after the one that ends the output are dropped."""
        for token in tokens:
            if self.reason is not None or self._tail is not None:
                return
            piece = self._folder.push((token,))
            self.tokens.append(token)
            self._pieces.append(piece)
            self._ends.append(self._ends[-1] + len(piece))
            self.reason = self._finish_after(token)

    def _finish_after(self, token: int) -> FinishReason | None:
        count = len(self.tokens)
        if token in self._rules.stop_token_ids and count >= self._rules.min_tokens:
            return FinishReason.STOP
        if self._folder.stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self._rules.max_tokens else None

    def seal(self) -> Position:
        """Position after the last token; events may end here from now on."""
        done = self._sealed[-1]
        if done == len(self.tokens):
            return Position(self.start.length + done, self._sealed_digests[-1])
        self._digest.update(self.tokens[done:])
        head = self._digest.position()
        self._sealed.append(len(self.tokens))
        self._sealed_digests.append(head.digest)
        return head

    def end(self, count: int | None = None) -> None:
        """Closes the output after ``count`` tokens (all by default) and releases the text held
        back there. Nothing can be pushed afterwards. Idempotent for the same count."""
        count = len(self.tokens) if count is None else count
        if self._tail is not None and count == len(self.tokens):
            return
        if count < len(self.tokens):
            self._cut(count)
        self._tail = self._folder.flush()
        self.seal()

    def _cut(self, count: int) -> None:
        """Forgets tokens that never reached the ledger. The fold cannot run backwards: redo it."""
        kept = self.tokens[:count]
        marks = bisect_right(self._sealed, count)
        self._digest = self._start.copy()
        self._digest.update(kept[: self._sealed[marks - 1]])
        del self._sealed[marks:], self._sealed_digests[marks:]
        del self._pieces[count:], self._ends[count + 1 :], self.tokens[count:]
        self._folder = self._new_folder()
        for token in kept:
            self._folder.push((token,))

    def digest_at(self, count: int) -> bytes:
        """Ledger digest after ``count`` output tokens."""
        state = self._start.copy()
        state.update(self.tokens[:count])
        return state.position().digest

    def event(self, first: int, released: int) -> pb.TurnTokens | None:
        """Tokens ``[first, …)`` up to the last sealed place that is released, bounded by
        MAX_TOKENS_PER_EVENT; None if there are none."""
        mark = bisect_right(self._sealed, min(released, first + MAX_TOKENS_PER_EVENT)) - 1
        if self._sealed[mark] <= first:
            # One seal spans more than the bound: send it whole rather than stall.
            mark = bisect_right(self._sealed, first)
            if mark == len(self._sealed) or self._sealed[mark] > released:
                return None
        last = self._sealed[mark]
        return pb.TurnTokens(
            position=self.start.length + first,
            token_ids=self.tokens[first:last],
            digest=self._sealed_digests[mark],
            text="".join(self._pieces[first:last]),
            text_offset=self._ends[first],
        )

    @property
    def tail(self) -> tuple[str, int]:
        """Text released only by the end, and its offset."""
        return self._tail or "", self._ends[-1]

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._pieces) + (self._tail or "")

    @property
    def text_end(self) -> int:
        """Length of :attr:`text` in code points."""
        return self._ends[-1] + len(self._tail or "")
