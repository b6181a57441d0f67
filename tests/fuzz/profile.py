"""How much a fuzz test tries: a few seconds each by default, the same examples in every run; with
``HYPOTHESIS_PROFILE=nightly`` many more, and others each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
NIGHTLY_FACTOR = 40
NIGHTLY_TIMEOUT_S = 3600


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Decorates a Hypothesis test that tries this many examples, more at night."""
    configured = settings(
        max_examples=examples * (NIGHTLY_FACTOR if NIGHTLY else 1),
        deadline=None,
        derandomize=not NIGHTLY,
        database=None,
        print_blob=True,
        # Most draw no more than a seed, of which there is no smaller one.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Any) -> Any:
        if NIGHTLY:
            test = pytest.mark.timeout(NIGHTLY_TIMEOUT_S)(test)
        return configured(test)

    return decorate
