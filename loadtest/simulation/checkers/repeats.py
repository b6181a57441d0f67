"""Asks of every write that was applied and comes again in the same words: it changes nothing (P3).

Answers get lost, so whoever waits for one sends its call again; and a network may deliver a call
twice. What a loss of writes took back may of course be written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from loadtest.simulation.world import World
from statestore import keys
from statestore.executor import Reply, ScriptCall

WRITES = frozenset({"append", "begin", "place", "resume", "switch_migration", "take"})
APPLIED = frozenset({b"appended", b"begun", b"resumed", b"written"})
BOOKKEEPING = frozenset({b"updated", b"version"})


@contextmanager
def judged_repeats(world: World) -> Iterator[None]:
    """Meanwhile every script is compared with those before."""
    server = world.server
    run_now, restore = server.run_now, server.restore
    applied: set[tuple[object, ...]] = set()

    def judged(call: ScriptCall) -> Reply:
        if call.script.name not in WRITES:
            return run_now(call)
        words = (call.script.name, *call.keys, *call.args)
        before = _stored(world, call) if words in applied else None
        reply = run_now(call)
        outcome = reply[0] if isinstance(reply, list) and reply else reply
        if outcome in APPLIED:
            if before is not None and _stored(world, call) != before:
                session_id = call.keys[0].rpartition(":s:")[2]
                world.violations.append(
                    f"{session_id}: P3: {call.script.name} was applied again when it was repeated"
                )
            applied.add(words)
        return reply

    def restored(snapshot: Any) -> None:
        restore(snapshot)
        applied.clear()

    with (
        mock.patch.object(server, "run_now", judged),
        mock.patch.object(server, "restore", restored),
    ):
        yield


def _stored(world: World, call: ScriptCall) -> tuple[object, object]:
    """The session's record, but for what every write touches, and its own ledger."""
    record = world.server.peek(call.keys[0])
    fields = record if isinstance(record, dict) else {}
    session_id = call.keys[0].rpartition(":s:")[2]
    kept = {name: value for name, value in fields.items() if name not in BOOKKEEPING}
    return kept, world.server.peek(keys.ledger_key(session_id))
