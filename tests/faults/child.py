"""A gateway or a worker in a process of its own: ``python -m tests.faults.child '{"role": …}'``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from typing import Any

from gateway.config import GatewayConfig
from gateway.core.liveness import LivenessLimits
from gateway.main import run as run_gateway
from tests.faults.fleet import CLOCK_MARK
from workers.config import ReplicaSettings, WorkerConfig
from workers.main import run as run_worker


def _say_the_time(*_: object) -> None:
    print(CLOCK_MARK, time.time(), file=sys.stderr, flush=True)


def main(options: dict[str, Any]) -> None:
    logging.basicConfig(
        level=os.environ.get("SESSILE_LOG", "INFO"),
        format="%(asctime)s.%(msecs)03d %(name)s %(levelname)s %(message)s",
    )
    signal.signal(signal.SIGUSR1, _say_the_time)
    role = options.pop("role")
    if role == "gateway":
        liveness = LivenessLimits(**options.pop("liveness"))
        run_gateway(GatewayConfig(liveness=liveness, **options))
        return
    replica = ReplicaSettings(**options.pop("replica"))
    engine_options = tuple(sorted(options.pop("engine_options").items()))
    run_worker(WorkerConfig(replica=replica, engine_options=engine_options, **options))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
