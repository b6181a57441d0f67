"""What this replica writes into ledgers for each tenant, as sums that heartbeats report."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from statestore.records import UsageSum
from workers.turn.run import TurnRun

MAX_TENANTS = 4096
"""Sums kept; that of the tenant that wrote least recently goes first, and is begun anew."""
MAX_REPORTED = 64
"""Sums in one report; the others are in the next ones."""


class WrittenTokens:
    """Counts input and output tokens once they are in a ledger, also of turns that still run."""

    def __init__(self) -> None:
        self._sums: OrderedDict[str, UsageSum] = OrderedDict()
        self._unreported: dict[str, None] = {}
        self._counted: dict[TurnRun, int] = {}
        """Of runs that have not ended."""
        self._begun = 0

    def pending(self, runs: Iterable[TurnRun]) -> Mapping[str, UsageSum]:
        """What was not reported yet; ``runs`` are those that have not ended."""
        for run in runs:
            self._count(run)
        return {tenant: self._sums[tenant] for tenant in list(self._unreported)[:MAX_REPORTED]}

    def reported(self, sums: Mapping[str, UsageSum]) -> None:
        """The store has these."""
        for tenant, known in sums.items():
            if self._sums.get(tenant) == known:
                self._unreported.pop(tenant, None)

    def ended(self, run: TurnRun) -> None:
        """The run writes nothing more."""
        self._count(run)
        self._counted.pop(run, None)

    def _count(self, run: TurnRun) -> None:
        written = _written(run)
        more = written - self._counted.get(run, 0)
        self._counted[run] = written
        if more > 0:
            self._add(run.tenant, more)

    def _add(self, tenant: str, tokens: int) -> None:
        known = self._sums.get(tenant)
        if known is None:
            self._begun += 1
            known = UsageSum(self._begun, 0)
        self._sums[tenant] = UsageSum(known.number, known.tokens + tokens)
        self._sums.move_to_end(tenant)
        self._unreported[tenant] = None
        if len(self._sums) > MAX_TENANTS:
            oldest, _ = self._sums.popitem(last=False)
            self._unreported.pop(oldest, None)


def _written(run: TurnRun) -> int:
    """Tokens that this run has put into the ledger; an attempt before it may have put others."""
    opened = run.opened
    if opened is None:
        return 0
    turn = opened.turn
    before = turn.output_end.length - turn.output_start.length
    given = turn.output_start.length - turn.input_start if opened.began else 0
    return given + max(0, run.released - before)
