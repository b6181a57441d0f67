"""How much tests try that draw their examples: a few seconds each by default; with
``HYPOTHESIS_PROFILE=nightly`` many more, and as long as they need."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FACTOR = 40
TIMEOUT_S = 3600
"""Of one test at night."""


def examples(count: int) -> int:
    """So many by default, more at night."""
    return count * FACTOR if NIGHTLY else count
