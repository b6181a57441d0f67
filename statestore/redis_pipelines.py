"""Pipelines of script calls: what is sent, what the replies mean, and waiting for replicas.

An answer may count only when replicas of the store have what it rests on (``wait_replicas``). WAIT
speaks of the writes of its own connection only: a repeat of a call whose answer was lost, or a read
of what another process wrote a moment ago, writes nothing, and WAIT would not wait for it. So a
small write of its own goes before it in the same pipeline. Whatever the server did up to then is
ahead of that in the stream of replication, and is on the replicas when it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from statestore.connection import StoreConnection
from statestore.executor import Reply, ScriptCall
from statestore.ports import StoreError, StoreUnavailable
from statestore.redis_failures import failure

FENCE_TTL_MS = 60_000


def add_calls(
    pipeline: Any, calls: Sequence[ScriptCall], *before: str, load: bool, **options: Any
) -> None:
    """EVALSHA, or EVAL to load what the server did not know; each after the command ``before``."""
    for call in calls:
        if before:
            pipeline.execute_command(*before, **options)
        script = ("EVAL", call.script.source) if load else ("EVALSHA", call.script.sha)
        pipeline.execute_command(*script, len(call.keys), *call.keys, *call.args, **options)


def meanings(calls: Sequence[ScriptCall], replies: Sequence[Any]) -> list[Reply | StoreError]:
    """One result per call."""
    return [
        failure(reply, call.script.name) if isinstance(reply, Exception) else reply
        for call, reply in zip(calls, replies, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ReplicaWait:
    """How many replicas have to have a write; with none, nothing is sent or waited for."""

    replicas: int = 0
    timeout_ms: int = 500

    @classmethod
    def of(cls, connection: StoreConnection) -> ReplicaWait:
        return cls(connection.wait_replicas, connection.wait_timeout_ms)

    def add(self, pipeline: Any, fence: str, *before_fence: str, **options: Any) -> None:
        """Ends a pipeline with the write ``fence`` (a key that its node serves; ``before_fence`` is
        a command that has to precede it) and WAIT."""
        if not self.replicas:
            return
        if before_fence:
            pipeline.execute_command(*before_fence, **options)
        pipeline.execute_command("SET", fence, "", "PX", FENCE_TTL_MS, **options)
        pipeline.execute_command("WAIT", self.replicas, self.timeout_ms, **options)

    def settled(
        self, results: list[Reply | StoreError], end: Sequence[Any]
    ) -> list[Reply | StoreError]:
        """The results of a pipeline whose last replies are ``end``; answers that too few replicas
        have are none yet."""
        if not self.replicas:
            return results
        fence, have = end[-2:]
        if isinstance(have, int) and have >= self.replicas and not isinstance(fence, Exception):
            return results
        missing = self._missing(fence, have)
        return [result if isinstance(result, StoreError) else missing for result in results]

    def _missing(self, fence: Any, have: Any) -> StoreError:
        for reply in (fence, have):
            if isinstance(reply, Exception):
                return failure(reply, "of WAIT")
        return StoreUnavailable(
            f"{have} of {self.replicas} replicas have it after {self.timeout_ms} ms: the store's"
            " replicas are down or behind (wait_replicas)"
        )


NO_REPLICAS = ReplicaWait()
