"""The world that a scenario is played in, and who watches its store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loadtest.simulation import checks
from loadtest.simulation import world as stage
from loadtest.simulation.witness import Witness
from loadtest.simulation.world import World
from statestore import keys
from statestore.executor import Reply, ScriptCall
from statestore.records import Epoch
from workers.engines.sim.config import SimConfig

MAX_WRITES_LOST = 64


@dataclass
class Stage(World):
    """Shares everything with the world it is made of, except which engine replicas start with."""

    engine: SimConfig = stage.ENGINE

    async def start_replica(self, name: str) -> None:
        with self.in_force():
            await super().start_replica(name)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Whoever asks for the simulation's engine gets this one."""
        usual = stage.ENGINE
        stage.ENGINE = checks.ENGINE = self.engine  # type: ignore[attr-defined]
        try:
            yield
        finally:
            stage.ENGINE = checks.ENGINE = usual  # type: ignore[attr-defined]


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
