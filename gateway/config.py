"""The gateway's settings: one frozen value, checked once. Every bound of the gateway is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gateway.core.failover import FailoverLimits
from gateway.core.liveness import LivenessLimits
from gateway.core.migration import MigrationLimits
from gateway.core.placement import PlacementModel
from gateway.core.quotas import EVERY_TENANT, TenantQuota, check_names
from gateway.security.config import GatewaySecurity
from gateway.telemetry.config import TelemetryConfig
from statestore.connection import StoreConnection, parse_address
from statestore.records import StoreLimits


@dataclass(frozen=True, slots=True)
class Admission:
    """Bounds on what callers may have open; over them they get RESOURCE_EXHAUSTED."""

    max_streams: int = 4096
    """RunTurn streams at once."""
    max_watches: int = 512
    """WatchSession and WatchFleet streams at once."""
    max_calls: int = 512
    """Unary calls at once."""
    share_per_tenant: float = 0.25
    """Of each of these three, how much one tenant may have (one at least)."""
    batch_share: float = 0.75
    """Of ``max_streams``, and of one tenant's share of it, how much may be open before batch turns
    are refused (one at least); the rest is for interactive ones. 1 keeps nothing for them."""
    max_open_calls: int = 128
    """Calls of the services that need no credentials (health, reflection) at once; one peer's
    address has the same share of them."""
    retry_after_ms: int = 500
    """Retry delay told to callers that were refused."""
    max_connections: int = 4096
    """Over it a new connection is closed unheard."""
    spare_calls: int = 256
    """Calls beyond these four bounds that are heard, to be refused with a retry delay; gRPC
    refuses the rest itself, without one."""
    max_message_bytes: int = 16 << 20
    """One message in either direction."""
    max_request_bytes: int = 5 << 20
    """One request: the largest preamble and what comes with it."""
    max_preamble_bytes: int = 4 << 20
    """Leading messages, tools and sampling defaults of a session."""
    max_labels: int = 32
    max_label_chars: int = 128
    max_id_chars: int = 128

    @property
    def max_rpcs(self) -> int:
        """Calls of all kinds that the transport takes at once."""
        bounded = self.max_streams + self.max_watches + self.max_calls + self.max_open_calls
        return bounded + self.spare_calls


@dataclass(frozen=True, slots=True)
class Times:
    """Periods and limits, seconds."""

    fleet_poll_s: float = 0.25
    store_retry_s: float = 0.05
    """Between tries while the store does not answer and a stream waits for it."""
    replica_call_s: float = 10.0
    """Unary calls to replicas, imports aside."""
    stop_turn_s: float = 2.0
    """Telling an owner to stop or release; the store has decided already."""
    settle_s: float = 0.5
    """Asking an owner to put back what the store lost, before the session is suspended, closed or
    forked. Short: an owner that is gone must not be in the way."""
    progress_s: float = 1.0
    """A silent stream whose owner is DOWN for this long is given up."""
    waiting_event_s: float = 1.0
    """Between TurnWaiting events while a turn has no replica."""
    no_candidate_s: float = 0.1
    """Between looks at the fleet while nobody can take a session."""
    watch_poll_s: float = 0.2
    sweep_period_s: float = 1.0
    sweep_lease_s: float = 5.0
    usage_poll_s: float = 0.5
    """A tenant's tokens are read anew when a turn begins and they were read longer ago."""
    recount_s: float = 600.0
    """Between counts of one tenant's ledgers."""
    recount_ask_s: float = 5.0
    """Between counts that are asked for because a tenant is over its quota."""
    default_turn_s: float = 600.0
    max_turn_s: float = 86_400.0
    default_migration_s: float = 30.0
    default_drain_s: float = 120.0
    shutdown_grace_s: float = 10.0
    keepalive_s: float = 10.0
    """Between pings on connections to clients and replicas that are in use."""
    keepalive_timeout_s: float = 5.0
    """A ping unanswered for this long ends its connection: the peer hangs or has vanished."""
    handshake_s: float = 5.0
    """A connection that has not said by then that it speaks HTTP/2 is closed."""
    request_s: float = 30.0
    """A call whose request has not come whole by then is refused; behind others of its caller it
    waits for its turn as long at most."""
    idle_connection_s: float = 300.0
    """A connection without a call for this long is closed; clients connect again when they need
    one. A silent stream is a call. Their age has no limit: it would cut long streams."""

    def keepalive_options(self) -> tuple[tuple[str, int], ...]:
        """Options of a gRPC server or channel. The ping's own timeout must be set too: it is a
        minute by default, and the keep-alive waits for a ping that is under way already."""
        timeout_ms = int(self.keepalive_timeout_s * 1000)
        return (
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            ("grpc.http2.ping_timeout_ms", timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),
        )


@dataclass(frozen=True, slots=True)
class Tables:
    """Sizes of tables and buffers."""

    owners: int = 65_536
    """Sessions whose tenant and owner are remembered; the least recently used is forgotten."""
    salts: int = 4096
    channels: int = 256
    """Connections to replicas; the least recently used one is closed."""
    relay_buffer_bytes: int = 256 << 10
    """Bytes of one stream that wait for a slow client; over it the replica's stream is paused."""
    takeovers: int = 32
    """Take-overs at once (P9)."""
    drain_moves: int = 4
    """Moves of one drain at once."""
    drain_batch: int = 256
    sweep_batch: int = 256
    usages: int = 4096
    """Tenants whose tokens are remembered; the least recently read is forgotten."""
    recount_batch: int = 256
    """Sessions counted at once, after each sweep."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything. Contradictory settings raise ValueError here, not later."""

    listen: str = "127.0.0.1:8470"
    """host:port; port 0 picks a free one."""
    gateway_id: str = ""
    """Names this process among gateways; empty: random."""
    redis_url: str = ""
    """redis://, rediss://, redis+sentinel://, redis+cluster://, unix:// …; empty: a private server.
    What does not belong into a URL is in ``redis``."""
    redis: StoreConnection = field(default_factory=StoreConnection)
    data_directory: Path | None = None
    """Where the private server keeps its data; None: nowhere, they end with this process."""
    reflection: bool = True
    admission: Admission = field(default_factory=Admission)
    times: Times = field(default_factory=Times)
    tables: Tables = field(default_factory=Tables)
    liveness: LivenessLimits = field(default_factory=LivenessLimits)
    failover: FailoverLimits = field(default_factory=FailoverLimits)
    placement: PlacementModel = field(default_factory=PlacementModel)
    migration: MigrationLimits = field(default_factory=MigrationLimits)
    store: StoreLimits = field(default_factory=StoreLimits)
    quotas: Mapping[str, TenantQuota] = field(default_factory=lambda: {EVERY_TENANT: TenantQuota()})
    """What tenants may use, by their names; ``*`` is for those without an own one. What one does
    not say is as here, not as for ``*``."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    security: GatewaySecurity = field(default_factory=GatewaySecurity)

    def __post_init__(self) -> None:
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ValueError(f"listen is host:port, not {self.listen!r}")
        self.security.check_listener("listen", host)
        if metrics := self.telemetry.prometheus_listen:
            self.security.check_metrics("prometheus_listen", metrics.rpartition(":")[0])
        if self.redis_url and self.data_directory is not None:
            raise ValueError(
                "data_directory is of a private store: give it, or redis_url, not both"
            )
        if self.redis_url:
            parse_address(self.redis_url, self.redis)
        for group in (self.admission, self.times, self.tables):
            for name in group.__dataclass_fields__:
                if getattr(group, name) <= 0:
                    raise ValueError(f"{name} must be positive")
        if self.admission.max_preamble_bytes >= self.admission.max_request_bytes:
            raise ValueError("max_request_bytes must be more than max_preamble_bytes")
        if self.admission.max_request_bytes > self.admission.max_message_bytes:
            raise ValueError("max_request_bytes must be at most max_message_bytes")
        check_names(self.quotas)
        largest = max((quota.message_bytes for quota in self.quotas.values()), default=0)
        if largest > self.admission.max_request_bytes:
            raise ValueError("a quota's message_bytes must be at most max_request_bytes")
        if max(self.admission.share_per_tenant, self.admission.batch_share) > 1:
            raise ValueError("share_per_tenant and batch_share are at most 1")
        if self.times.fleet_poll_s * 2 > self.liveness.outage_after_s:
            raise ValueError("fleet_poll_s must be at most half of outage_after_s")
        if self.times.sweep_period_s * 2 > self.times.sweep_lease_s:
            raise ValueError("sweep_period_s must be at most half of sweep_lease_s")
        if self.times.default_turn_s > self.times.max_turn_s:
            raise ValueError("default_turn_s must not exceed max_turn_s")
