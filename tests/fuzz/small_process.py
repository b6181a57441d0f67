"""Processes with small bounds, so that an attack on them is a small one."""

from __future__ import annotations

import logging
import sys

from gateway.config import Admission, GatewayConfig, Times
from gateway.core.quotas import TenantQuota
from gateway.main import run as run_gateway
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import run as run_worker

ADMISSION = Admission(
    max_streams=12,
    max_watches=12,
    max_calls=12,
    max_connections=100,
    max_message_bytes=1 << 20,
    max_request_bytes=1 << 20,
    max_preamble_bytes=1 << 19,
)
HANDSHAKE_S = 30.0
GLUTTON = "glutton"
QUOTAS = {
    "*": TenantQuota(sessions=500),
    GLUTTON: TenantQuota(tokens_per_minute=2_000, running_turns=2),
}
ENGINE = (("decode_token_ms", "0"), ("eos_probability", "0"), ("step_ms", "5"))


def main(role: str, redis_url: str) -> None:
    """Serves until it is told to stop; announces its address. A role is ``gateway`` or the id of a
    worker."""
    logging.basicConfig(level="CRITICAL")
    if role == "gateway":
        run_gateway(
            GatewayConfig(
                listen="127.0.0.1:0",
                redis_url=redis_url,
                admission=ADMISSION,
                quotas=QUOTAS,
                times=Times(handshake_s=HANDSHAKE_S),
            )
        )
    else:
        replica = ReplicaSettings(replica_id=role)
        run_worker(WorkerConfig(redis_url=redis_url, replica=replica, engine_options=ENGINE))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
