"""Telling the fleet that this replica is alive, and how loaded it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import anyio

from statestore.ports import JournalPort, StoreUnavailable
from statestore.records import ReplicaRef, UsageSum
from statestore.replica_info import ReplicaLoad

log = logging.getLogger(__name__)


class ReplicaReplaced(Exception):
    """Another process has registered under this replica's id: this one must stop."""


class Reporting(Protocol):
    """What a heartbeat asks of its replica."""

    def load(self) -> ReplicaLoad: ...

    def store_answered(self, answered: bool) -> None:
        """Whether the last beat was answered."""
        ...

    def doubt(self) -> None:
        """The store has lost writes: it has gone back behind a count that it had acknowledged."""
        ...

    def unreported_usage(self) -> Mapping[str, UsageSum]:
        """What was written for tenants and not reported yet."""
        ...

    def usage_reported(self, sums: Mapping[str, UsageSum]) -> None:
        """The store has these."""
        ...


async def heartbeat(
    store: JournalPort, ref: ReplicaRef, replica: Reporting, period_s: float
) -> None:
    """Counts up in the store every ``period_s`` until cancelled, and tells load and usage.

    A store that does not answer is waited for: observers give everyone amnesty after an outage
    (P9), and the ledger's fences, not heartbeats, protect the sessions. Raises ReplicaReplaced.
    """
    counter, acknowledged, answered = 0, 0, True
    while True:
        counter += 1
        usage = replica.unreported_usage()
        try:
            before = await store.heartbeat(ref, counter, replica.load().to_json(), usage)
        except StoreUnavailable as error:
            if answered:
                log.warning("heartbeat of %s: the store does not answer: %s", ref, error)
            answered = False
            replica.store_answered(False)
        else:
            answered = True
            replica.store_answered(True)
            replica.usage_reported(usage)
            if before is None:
                raise ReplicaReplaced(f"{ref} was replaced by a newer process of the same id")
            if before < acknowledged:
                log.warning("heartbeat of %s: the store has lost writes", ref)
                replica.doubt()
            acknowledged = counter
        await anyio.sleep(period_s)
