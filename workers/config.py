"""A worker's settings: frozen, checked once, and refused loudly if they make no sense."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from gateway.security.config import WorkerSecurity
from gateway.telemetry.config import TelemetryConfig
from statestore.connection import StoreConnection, parse_address

MAX_REPLICA_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """Bounds of turns and their runs; seconds unless named otherwise."""

    max_unacked_steps: int = 4
    """Steps generated but not yet journalled before the engine is parked for this turn."""
    max_streams: int = 8
    """Streams attached to one turn."""
    detach_grace_s: float = 60.0
    """A turn nobody listens to ends CANCELLED after this."""
    progress_timeout_s: float = 120.0
    """An engine without any step for this long, though it has work, is taken for hung."""
    waiting_interval_s: float = 2.0
    """A stream without anything to send says every so often that it is alive."""
    open_timeout_s: float = 30.0
    """How long a call waits for the store before it is refused as Unavailable."""
    batch_share: float = 0.5
    """Of the engine's queue, how much may be taken, by whatever turns, before new batch turns are
    refused; the rest is for interactive ones. 1 keeps nothing for them."""

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.batch_share > 1:
            raise ValueError(f"batch_share is at most 1, not {self.batch_share}")


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What can be set of a replica apart from its adapters; seconds unless named otherwise."""

    replica_id: str
    site: str = ""
    hardware: str = ""
    heartbeat_period_s: float = 0.5
    """Well below the observers' lease (2 s by default)."""
    journal_lanes: int = 1
    """Pipelines to the store at once; one per shard of a cluster."""
    max_resident_sessions: int = 4096
    max_resident_tokens: int = 1 << 26
    """Token ids of all resident sessions, 4 bytes each."""
    pin_ttl_s: float = 120.0
    """How long a session's KV is preferred over other cache after a turn."""
    pull_timeout_s: float = 30.0
    """A KV pull from a peer is given up after this."""
    drain_grace_s: float = 0.0
    """How long a process that was told to end (SIGTERM) waits for its sessions to be moved, with
    their KV. 0: it ends at once, and turns go on elsewhere by recomputing. `sessile worker` has 20
    unless it is set. Give the process more than this before it is killed."""
    turn: TurnLimits = field(default_factory=TurnLimits)

    def __post_init__(self) -> None:
        if not 1 <= len(self.replica_id) <= MAX_REPLICA_ID_CHARS:
            raise ValueError(f"replica_id must have 1 to {MAX_REPLICA_ID_CHARS} characters")
        _require_positive(self)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process."""

    redis_url: str
    """Of the store that the gateways use: redis://, rediss://, redis+sentinel://, redis+cluster://,
    unix:// …; what does not belong into a URL is in ``redis``."""
    replica: ReplicaSettings
    redis: StoreConnection = field(default_factory=StoreConnection)
    engine: str = "sim"
    """See ``workers/engines/registry.py``."""
    engine_options: tuple[tuple[str, str], ...] = ()
    """The engine's own options, as text."""
    listen: str = "127.0.0.1:0"
    """host:port of the replica service; port 0 takes a free one."""
    kv_listen: str = "127.0.0.1:0"
    """host:port of the KV data channel."""
    advertise_host: str = ""
    """Host that gateways and peers should use, if it is not the one listened on."""
    shutdown_grace_s: float = 2.0
    """Streams are cut this long after a stop (their turns go on elsewhere)."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    security: WorkerSecurity = field(default_factory=WorkerSecurity)
    public_prefixes: Path | None = None
    """TOML file of leading messages whose KV all tenants may share (engines sim and torch); the
    same for all workers. See docs/SECURITY.md."""

    def __post_init__(self) -> None:
        if not self.redis_url:
            raise ValueError("a worker needs the URL of the gateways' store (redis_url)")
        parse_address(self.redis_url, self.redis)
        for name in ("listen", "kv_listen"):
            host, _ = split_address(name, getattr(self, name))
            self.security.check_listener(name, host)
        if metrics := self.telemetry.prometheus_listen:
            self.security.check_metrics("prometheus_listen", metrics.rpartition(":")[0])
        wildcard = split_address("listen", self.listen)[0] in ("0.0.0.0", "::")
        if wildcard and not self.advertise_host:
            raise ValueError("with a wildcard listen address, advertise_host must say how to call")
        names = [name for name, _ in self.engine_options]
        if len(set(names)) != len(names):
            raise ValueError("an engine option is given twice")
        _require_positive(self)


def split_address(name: str, address: str) -> tuple[str, int]:
    """host and port; raises ValueError naming the setting."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{name} must be host:port, not {address!r}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Inverse of :func:`split_address`: an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _require_positive(config: TurnLimits | ReplicaSettings | WorkerConfig) -> None:
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if setting.name == "drain_grace_s":
            if not value >= 0:
                raise ValueError(f"{setting.name} must not be negative, it is {value}")
        elif isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{setting.name} must be positive, not {value}")
