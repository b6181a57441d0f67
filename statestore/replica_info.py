"""What replicas tell gateways through the store: once at registration, and with each heartbeat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL_VERSION = 1
"""Newest version of the replica API that this code speaks."""
PROTOCOL_OLDEST = 1
"""Oldest version of it that this code still speaks."""


@dataclass(frozen=True, slots=True)
class ReplicaDetails:
    """Fixed for an incarnation."""

    endpoint: str
    """host:port of the replica service."""
    model: str
    engine: str
    token_fingerprint: str
    """Hex. Gates whether a session may continue there at all."""
    kv_fingerprint: str
    """Hex. Gates only the use of KV pages."""
    page_size: int
    capacity_pages: int
    max_context_tokens: int
    max_running_turns: int
    max_queued_turns: int
    site: str = ""
    hardware: str = ""
    protocol_min: int = PROTOCOL_OLDEST
    protocol_max: int = PROTOCOL_VERSION
    batch_share: float = 1.0
    """Of its queue, how much is taken before batch turns are refused. One that does not tell does
    not know of them, and refuses none earlier."""
    features: tuple[str, ...] = ()

    @property
    def speaks_with_us(self) -> bool:
        """Whether there is a version of the replica API that both sides speak."""
        return self.protocol_min <= PROTOCOL_VERSION and self.protocol_max >= PROTOCOL_OLDEST

    def places(self, *, batch: bool) -> int:
        """Turns that run and wait there before a batch turn, or any other, is refused."""
        queued = self.max_queued_turns
        return self.max_running_turns + (int(queued * self.batch_share) if batch else queued)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ReplicaDetails:
        """Ignores fields it does not know; raises ValueError if one is missing or not as it has
        to be."""
        values = _known(cls, text)
        values["features"] = tuple(values.get("features", ()))
        details = cls(**values)
        for fingerprint in (details.token_fingerprint, details.kv_fingerprint):
            bytes.fromhex(fingerprint)
        if details.page_size == 0:
            raise ValueError("a page of no tokens")
        return details


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """Replaced with each heartbeat."""

    running_turns: int = 0
    queued_turns: int = 0
    queued_prefill_tokens: int = 0
    free_pages: int = 0
    pinned_pages: int = 0
    sessions: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    leaving: bool = False
    """It was told to end, drains, and asks gateways to move its sessions elsewhere meanwhile."""
    leading: Mapping[str, int] = field(default_factory=dict)
    """Hex leading-message digest -> tokens of that prefix resident here; the most recent ones,
    at most ``MAX_LEADING``."""
    tenants: Mapping[str, int] = field(default_factory=dict)
    """Tenant -> its turns that run or wait here; of the busiest ones, at most ``MAX_ENTRIES``."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ReplicaLoad:
        """As that of the details; a replica that has not told its load yet has none."""
        return cls(**_known(cls, text)) if text else cls()


MAX_ENTRIES = 64
"""Of one mapping."""
MAX_LEADING = MAX_ENTRIES
MAX_RATE = 1e12
"""Tokens per second that are taken for a measurement."""


def _known(cls: type[Any], text: str) -> dict[str, Any]:
    """The fields of a record that its class knows, checked: gateways compute with what any replica
    wrote, and pass it on."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{cls.__name__}: nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected a JSON object")
    known: dict[str, Any] = {}
    for field_ in dataclasses.fields(cls):
        if field_.name in values:
            known[field_.name] = values[field_.name]
            if not _FITS[field_.type](known[field_.name]):
                raise ValueError(f"{cls.__name__}.{field_.name} is no {field_.type}")
        elif field_.default is dataclasses.MISSING is field_.default_factory:
            raise ValueError(f"{cls.__name__}.{field_.name} is missing")
    return known


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_RATE  # type: ignore[operator]


_FITS: dict[Any, Callable[[Any], bool]] = {
    "str": _is_text,
    "bool": lambda value: type(value) is bool,
    "int": _is_count,
    "float": _is_rate,
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "Mapping[str, int]": lambda value: (
        isinstance(value, dict)
        and len(value) <= MAX_ENTRIES
        and all(map(_is_count, value.values()))
    ),
}
"""By the annotation of a field."""
