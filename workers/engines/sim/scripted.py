"""The sim engine with lines to say: a model for tests of what uses it.

What is said stays a function of the context and the turn's seed: a turn that goes on on another
replica of the same script, or is computed again, says the same.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from workers.engines.registry import Backend
from workers.engines.scheduling import Generation
from workers.engines.sim.config import SimConfig
from workers.engines.sim.engine import SimEngine
from workers.engines.sim.model import Context
from workers.text.byte_vocabulary import ASSISTANT, END_OF_TURN
from workers.text.bytes_codec import BytesCodec
from workers.text.port import Call
from workers.text.tool_calls import parse_hermes

MAX_LINES = 100_000
"""Waiting to be said."""
MAX_SAID = 10_000
"""Turns whose line is remembered; the least recently used is forgotten."""

SPACE = ord(" ")


class Script:
    """Lines, said in order: the next one by each turn that begins to speak. A turn for which there
    is none speaks as the sim engine does. One script may serve all replicas of a fleet, and be
    written to by any thread."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._said: OrderedDict[bytes, bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        """Raises OverflowError past MAX_LINES."""
        if len(self._lines) >= MAX_LINES:
            raise OverflowError(f"{MAX_LINES} lines wait already; let turns say them first")
        self._lines.append(line.encode())

    @property
    def waiting(self) -> tuple[str, ...]:
        """Lines that no turn has begun to say."""
        return tuple(line.decode() for line in self._lines)

    def line_for(self, prompt: Sequence[int], seed: int) -> bytes | None:
        """The line of the turn with this prompt and seed: the next one when first asked."""
        key = hashlib.blake2b(
            array("I", prompt).tobytes(), digest_size=16, salt=(seed % (1 << 64)).to_bytes(8)
        ).digest()
        with self._lock:
            if key in self._said:
                self._said.move_to_end(key)
                return self._said[key]
            line = self._lines.popleft() if self._lines else None
            self._said[key] = line
            if len(self._said) > MAX_SAID:
                self._said.popitem(last=False)
            return line


class ScriptedEngine(SimEngine):
    """See the module's docstring."""

    def __init__(self, config: SimConfig, clock: Callable[[], float], script: Script) -> None:
        super().__init__(config, clock)
        self._script = script

    def _say(self, generation: Generation, context: Context) -> int:
        tokens = generation.tokens
        # Output holds no markers: what follows the last one has been said in this turn.
        begun = next(i for i in range(len(tokens), 0, -1) if tokens[i - 1] == ASSISTANT)
        line = self._script.line_for(tokens[:begun], generation.request.sampling.seed)
        if line is None:
            return super()._say(generation, context)
        said = len(tokens) - begun
        if said < len(line):
            return line[said]
        may_end = generation.generated >= generation.request.min_new_tokens
        return END_OF_TURN if may_end else SPACE


class ScriptedCodec(BytesCodec):
    """Reads calls as models of the Hermes format write them."""

    token_fingerprint = hashlib.blake2b(b"scripted bytes 1", digest_size=16).digest()

    def parse_tool_calls(self, text: str, turn_id: str) -> tuple[Call, ...]:
        return parse_hermes(text, turn_id)


def scripted_backend(config: SimConfig, clock: Callable[[], float], script: Script) -> Backend:
    """For a replica whose model says what the script has."""
    return Backend(ScriptedEngine(config, clock, script), ScriptedCodec())
