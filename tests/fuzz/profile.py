"""How much a fuzz test tries: a few seconds each by default, the same examples in every run; with
``HYPOTHESIS_PROFILE=nightly`` many more, and others each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from tests.support.nightly import NIGHTLY, examples


def fuzz(count: int) -> Callable[[Any], Any]:
    """Decorates a Hypothesis test that tries this many examples, more at night."""
    return settings(
        max_examples=examples(count),
        deadline=None,
        derandomize=not NIGHTLY,
        database=None,
        print_blob=True,
        # Most draw no more than a seed, of which there is no smaller one.
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
