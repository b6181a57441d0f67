"""What an engine has computed for each tenant, so that whoever has had least goes first.

After the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
2024). A tenant that waited for nothing has at least what an equal part of everything would have
given (the virtual time of fair queueing): what it did not ask for is not saved up. That grows with
all that is computed, so tenants that come and go do not stay ahead of one that has had more.
"""

from __future__ import annotations

PROMPT_TOKEN = 1
SAMPLED_TOKEN = 2
"""What a token counts, as in the paper: each that is sampled takes a place in a step."""


class FairShares:
    """Counts for the tenants that have something in the engine, and for no others."""

    def __init__(self) -> None:
        self._served: dict[bytes, float] = {}
        self._generations: dict[bytes, int] = {}
        self._equal_part = 0.0
        """What a tenant would have had that was always here."""

    def __len__(self) -> int:
        """Tenants that have something here."""
        return len(self._served)

    def served(self, tenant: bytes) -> float:
        """What the tenant, which has something here, has had."""
        return self._served[tenant]

    def arrived(self, tenant: bytes, *, waits: bool = False) -> None:
        """A generation of the tenant waits, or runs, from now on. ``waits``: another one waits
        already."""
        if not waits:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._equal_part)
        self._generations[tenant] = self._generations.get(tenant, 0) + 1

    def left(self, tenant: bytes) -> None:
        """One of its generations has ended."""
        self._generations[tenant] -= 1
        if not self._generations[tenant]:
            del self._generations[tenant], self._served[tenant]

    def charge(self, tenant: bytes, *, prompt: int = 0, sampled: int = 0) -> None:
        """So many tokens of one of its generations are computed."""
        cost = prompt * PROMPT_TOKEN + sampled * SAMPLED_TOKEN
        self._served[tenant] += cost
        self._equal_part += cost / len(self._served)
