"""The one thing the store adapter needs from a server: run these scripts.

Every shared read and write of Sessile is a Lua script on keys of one hash slot, so a server, a
cluster and the simulation's in-process interpreter all sit behind the same two-line port.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from statestore.ports import StoreError

Reply = bytes | int | None | list["Reply"]
"""What Redis answers (RESP2 types)."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, named for traces and errors."""

    name: str
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One invocation; all ``keys`` are in one hash slot."""

    script: Script
    keys: tuple[str, ...]
    args: tuple[bytes | str | int, ...]


class ScriptExecutor(Protocol):
    """Runs scripts atomically, each by itself."""

    async def execute(
        self, calls: Sequence[ScriptCall], timeout_s: float
    ) -> list[Reply | StoreError]:
        """One reply or failure per call, in order, sent as one pipeline where the server can.
        A call without an answer within ``timeout_s`` (or on a broken connection) is
        ``StoreUnavailable``: it may have been applied. Never retries by itself."""
        ...

    async def aclose(self) -> None: ...
