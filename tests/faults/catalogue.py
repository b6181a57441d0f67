"""Every class of fault: who is hit, in which phase, by what, over which store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from gateway.core.migration import MigrationLimits
from tests.faults import engines, networks, overlaps, processes, stores
from tests.faults.fleet import Fleet, fleet
from tests.faults.rounds import LONG_PROMPT, LONGEST_GAP_S, FaultClass
from tests.faults.servers import ClusterStore, SentinelStore, SingleStore

HOLD_S = MigrationLimits().hold_s
"""How long a replica holds a turn for a gateway that may be gone."""
GONE = ("gateway", "kill")
"""Its clients are told by its kernel, unlike those of one that is stopped."""

CLOCKS = "everysec, clocks that can be set"
TORCH = "everysec, torch engine"
FLEETS: dict[str, Callable[[], AbstractAsyncContextManager[Fleet]]] = {
    "everysec": lambda: fleet(SingleStore("everysec")),
    "always": lambda: fleet(SingleStore("always")),
    CLOCKS: lambda: fleet(SingleStore("everysec"), clocks=True),
    TORCH: lambda: fleet(SingleStore("everysec"), engine=engines.TORCH),
    "sentinel": lambda: fleet(SentinelStore()),
    "cluster": lambda: fleet(ClusterStore()),
}
"""Kinds of fleets, named by their stores and what else is special of them."""


def _of_processes() -> list[FaultClass]:
    found: list[FaultClass] = []
    for who, phases in (
        ("worker", processes.WORKER_PHASES),
        ("gateway", processes.GATEWAY_PHASES),
    ):
        for phase_name, phase in phases.items():
            long = phase_name in ("kv-export", "kv-import", "migration")
            for fault_name, fault in (("kill", processes.killed), ("stop", processes.frozen)):
                found.append(
                    FaultClass(
                        f"{who}-{phase_name}-{fault_name}",
                        fault(phase),
                        opens_itself=phase_name == "open",
                        focus_prompt=LONG_PROMPT if long else 30,
                        silences_gateways=(who, fault_name) == ("gateway", "stop"),
                        longest_gap_s=HOLD_S + 1.0 if (who, fault_name) == GONE else LONGEST_GAP_S,
                    )
                )
    return found


def _of_networks() -> list[FaultClass]:
    return [
        FaultClass(
            f"{path}-{fault}",
            networks.on_path(path, fault),
            silences_gateways=(path, fault) == ("client-gateway", "half-open"),
        )
        for path in ("client-gateway", "gateway-worker", "worker-redis")
        for fault in ("delay", "cut", "half-open", "throttle")
    ]


CLASSES: list[FaultClass] = [
    *_of_processes(),
    *_of_networks(),
    FaultClass("torch-decode-kill", processes.killed_in_mid_turn(processes.long_decode), TORCH),
    FaultClass(
        "torch-group-commit-kill", processes.killed_in_mid_turn(processes.group_commit), TORCH
    ),
    FaultClass("client-slow", networks.slow_client, plain_focus=True),
    FaultClass("client-vanished", networks.vanished_client, plain_focus=True),
    FaultClass("worker-clock-jump", networks.clock_jump, CLOCKS),
    FaultClass("redis-restart-everysec", stores.restart),
    FaultClass("redis-disk-full-everysec", stores.disk_full),
    FaultClass("redis-memory-limit", stores.memory_full),
    FaultClass("redis-power-cut-everysec", stores.power_cut, lossy=True),
    FaultClass("redis-restart-always", stores.restart, "always"),
    FaultClass("redis-disk-full-always", stores.disk_full, "always"),
    FaultClass("redis-sentinel-promotion", stores.promotion, "sentinel", lossy=True),
    FaultClass("redis-cluster-slot-move", stores.slot_move, "cluster"),
    FaultClass("both-redis-restart-worker-kill", overlaps.redis_restart_and_worker_kill),
    FaultClass("both-redis-memory-limit-worker-kill", overlaps.memory_limit_and_worker_kill),
    FaultClass("both-worker-kill-next-worker-kill", overlaps.worker_kill_twice),
    FaultClass("both-worker-stop-gateway-kill", overlaps.worker_stop_and_gateway_kill),
    FaultClass("both-worker-redis-cut-gateway-kill", overlaps.redis_cut_and_gateway_kill),
    FaultClass(
        "both-kv-export-stop-redis-promotion",
        overlaps.promotion_and_export_stop,
        "sentinel",
        lossy=True,
        focus_prompt=LONG_PROMPT,
    ),
]
