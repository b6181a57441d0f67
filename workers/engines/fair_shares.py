"""What an engine has computed for each tenant, so that whoever has had least goes first.

After the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
2024). A tenant that has had nothing to do begins where the least served of the others is: idle time
is not saved up.
"""

from __future__ import annotations

PROMPT_TOKEN = 1
SAMPLED_TOKEN = 2
"""What a token counts, as in the paper: each that is sampled takes a place in a step."""


class FairShares:
    """Counts for the tenants that have something in the engine, and for no others."""

    def __init__(self) -> None:
        self._served: dict[bytes, int] = {}
        self._generations: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Tenants that have something here."""
        return len(self._served)

    def served(self, tenant: bytes) -> int:
        """What the tenant, which has something here, has had."""
        return self._served[tenant]

    def arrived(self, tenant: bytes) -> None:
        """A generation of the tenant waits, or runs, from now on."""
        if tenant not in self._served:
            self._served[tenant] = min(self._served.values(), default=0)
        self._generations[tenant] = self._generations.get(tenant, 0) + 1

    def left(self, tenant: bytes) -> None:
        """One of its generations has ended."""
        self._generations[tenant] -= 1
        if not self._generations[tenant]:
            del self._generations[tenant], self._served[tenant]

    def charge(self, tenant: bytes, *, prompt: int = 0, sampled: int = 0) -> None:
        """So many tokens of one of its generations are computed."""
        self._served[tenant] += prompt * PROMPT_TOKEN + sampled * SAMPLED_TOKEN
