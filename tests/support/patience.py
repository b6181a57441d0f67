"""For fleets of real processes, any of which may stand still for a while on a machine that has
other work too."""

from __future__ import annotations

PATIENT = {
    "SESSILE_GATEWAY__LIVENESS__SUSPECT_AFTER_S": "4",
    "SESSILE_GATEWAY__LIVENESS__DOWN_AFTER_S": "5",
}
"""Environment of gateways that do not replace a worker which is silent for 2 s, as they do by
default: for tests that count moves. One whose process has ended is still replaced at once."""
