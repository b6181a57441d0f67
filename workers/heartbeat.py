"""Telling the fleet that this replica is alive, and how loaded it is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio

from statestore.ports import JournalPort, StoreUnavailable
from statestore.records import ReplicaRef
from statestore.replica_info import ReplicaLoad

log = logging.getLogger(__name__)


class ReplicaReplaced(Exception):
    """Another process has registered under this replica's id: this one must stop."""


async def heartbeat(
    store: JournalPort,
    ref: ReplicaRef,
    load: Callable[[], ReplicaLoad],
    period_s: float,
    on_loss: Callable[[], None],
) -> None:
    """Counts up in the store every ``period_s`` until cancelled. ``on_loss`` is called when the
    store has gone back behind a count that it had acknowledged.

    A store that does not answer is waited for: observers give everyone amnesty after an outage
    (P9), and the ledger's fences, not heartbeats, protect the sessions. Raises ReplicaReplaced.
    """
    counter, acknowledged, answered = 0, 0, True
    while True:
        counter += 1
        try:
            before = await store.heartbeat(ref, counter, load().to_json())
        except StoreUnavailable as error:
            if answered:
                log.warning("heartbeat of %s: the store does not answer: %s", ref, error)
            answered = False
        else:
            answered = True
            if before is None:
                raise ReplicaReplaced(f"{ref} was replaced by a newer process of the same id")
            if before < acknowledged:
                log.warning("heartbeat of %s: the store has lost writes", ref)
                on_loss()
            acknowledged = counter
        await anyio.sleep(period_s)
