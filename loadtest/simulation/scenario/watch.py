"""Who watches the store of a scenario."""

from __future__ import annotations

from collections import deque
from typing import Any

from loadtest.simulation.checkers.witness import Witness
from loadtest.simulation.world import World
from statestore import keys
from statestore.executor import Reply, ScriptCall
from statestore.records import Epoch

MAX_WRITES_LOST = 64


class Watch(Witness):
    """Remembers what the store was before each write to a session, and counts epochs."""

    def __init__(self, built: World) -> None:
        super().__init__(built.server.peek)
        self.epochs: dict[str, list[Epoch]] = {}
        self.before: deque[Any] = deque(maxlen=MAX_WRITES_LOST)
        self._server = built.server
        self._now = self._server.snapshot()

    def __call__(self, call: ScriptCall, reply: Reply) -> None:
        super().__call__(call, reply)
        if call.script.name.startswith("read_"):
            return
        for key in call.keys[:1]:
            _, found, session_id = key.partition(":s:")
            record = self._server.peek(keys.session_key(session_id)) if found else None
            if isinstance(record, dict) and b"epoch" in record:
                self.before.append(self._now)
                epoch = Epoch(int(record[b"epoch"]), record[b"nonce"])
                known = self.epochs.setdefault(session_id, [])
                if epoch.number and epoch not in known:
                    known.append(epoch)
        self._now = self._server.snapshot()
