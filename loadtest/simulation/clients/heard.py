"""What one client hears of one turn, judged as far as a client can judge it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sessile.v1 import types_pb2 as pb

from gateway.core.errors import SessileError


@dataclass
class TurnHeard:
    """One turn as one client has it, over all of its streams."""

    session_id: str
    turn_id: str
    request: pb.RunTurnRequest
    start: pb.Position | None = None
    index: int = 0
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)
    """Ledger position -> digest, as told."""
    text: str = ""
    finished: pb.TurnFinished | None = None
    error: SessileError | None = None
    moves: int = 0
    cut_off_by: str = ""
    """The gateway that died under its last stream, until tokens come again."""
    given_up: bool = False
    """Its client was told since that the store lost what it knows: the ledger need not have this
    any more. What is wrong with the streams themselves stays wrong."""
    violations: list[str] = field(default_factory=list)
    _accepted: bool = False

    @property
    def asks_for_no_seed(self) -> bool:
        return not self.request.params.HasField("seed")

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.error is not None

    @property
    def resume_from(self) -> pb.Position | None:
        """The last place this client has; None before the first token."""
        if self.start is None or not self.tokens:
            return None
        length = self.start.length + len(self.tokens)
        return pb.Position(length=length, digest=self.digests[length])

    def begin_stream(self) -> None:
        """A new stream of the turn follows."""
        self._accepted = False

    def hear(self, event: pb.TurnEvent) -> None:
        """Takes one event."""
        kind = event.WhichOneof("event")
        again = kind == "finished"
        self._expect(self.finished is None, "finished twice" if again else f"{kind} after the end")
        if kind == "accepted":
            self._take_acceptance(event.accepted)
        elif kind == "tokens":
            self._take_tokens(event.tokens)
        elif kind == "moved":
            self.moves += 1
        elif kind == "finished":
            self.finished = event.finished
            self._take_text(event.finished.text, event.finished.text_offset)
            self._expect(len(self.text) == event.finished.text_end, "the text ends elsewhere")
        else:
            self._expect(kind == "waiting", f"unexpected {kind}")

    def _take_acceptance(self, accepted: pb.TurnAccepted) -> None:
        self._expect(accepted.turn_id == self.turn_id, f"{accepted.turn_id} was accepted")
        self._expect(not self._accepted, "accepted a second time in one stream")
        self._accepted = True
        if self.start is not None:
            self._expect(self.start == accepted.output_start, "the output moved")
            same = (self.index, self.seed) == (accepted.turn_index, accepted.seed)
            self._expect(same, "accepted with another index or seed than before")
        self.start = accepted.output_start
        self.index, self.seed = accepted.turn_index, accepted.seed

    def _take_tokens(self, tokens: pb.TurnTokens) -> None:
        if self.start is None or not self._accepted:
            self.violations.append("I2: tokens before the turn was accepted")
            return
        expected = self.start.length + len(self.tokens)
        self._expect(tokens.position == expected, f"tokens at {tokens.position}, not {expected}")
        self.tokens += tokens.token_ids
        self.digests[expected + len(tokens.token_ids)] = tokens.digest
        self._take_text(tokens.text, tokens.text_offset)

    def _take_text(self, text: str, offset: int) -> None:
        if text and offset != len(self.text):
            self.violations.append(f"P17: text at {offset}, not {len(self.text)}")
        self.text += text

    def _expect(self, condition: bool, complaint: str) -> None:
        if not condition:
            self.violations.append(f"I2: {complaint}")
