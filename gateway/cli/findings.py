"""What a check of ``sessile doctor`` found."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How bad it is: nothing, worth a look, or in the way of running or of being safe."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. What is not ok has a fix."""

    check: str
    """What was looked at: ``store version``, ``port gateway.listen`` …"""
    level: Level
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Level.OK, detail)


def warned(check: str, detail: str, fix: str) -> Finding:
    """It works, and may not go on to."""
    return Finding(check, Level.WARN, detail, fix)


def failed(check: str, detail: str, fix: str) -> Finding:
    """It does not work, or loses what it must keep."""
    return Finding(check, Level.FAIL, detail, fix)
