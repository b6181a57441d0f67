"""What replicas tell gateways through the store: once at registration, and with each heartbeat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL_VERSION = 1
"""Version of the replica API that this code speaks (oldest and newest so far)."""


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
    protocol_min: int = PROTOCOL_VERSION
    protocol_max: int = PROTOCOL_VERSION
    features: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ReplicaDetails:
        """Ignores fields it does not know; raises ValueError or TypeError if one is missing."""
        values = _known(cls, json.loads(text))
        values["features"] = tuple(values.get("features", ()))
        return cls(**values)


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
    leading: Mapping[str, int] = field(default_factory=dict)
    """Hex leading-message digest -> tokens of that prefix resident here; the most recent ones,
    at most ``MAX_LEADING``."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ReplicaLoad:
        return cls(**_known(cls, json.loads(text))) if text else cls()


MAX_LEADING = 64


def _known(cls: type[Any], values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected a JSON object")
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in values.items() if key in names}
