"""What sglang's server is told: the user's arguments between Sessile's defaults and what Sessile
needs. As text by the argument's name; :mod:`workers.engines.sglang.native` has sglang read it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from workers.engines.sglang.config import SglangConfig, refuse_argument
from workers.engines.sglang_requests.events import TOPIC

PREFETCH_THRESHOLD_PAGES = 1
"""Pages in a storage that are worth a look, at least."""
CPU_DEFAULTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "sleep_on_idle": "true",
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "layer_first",
    "hicache_ratio": "1.1",
}
CPU_MAX_TOTAL_TOKENS = "32768"
"""Where the device's memory is the host's, sglang would give most of it to the device's KV, and
nothing were left for the copies in host memory."""
OWN_STORAGE_DEFAULTS = {
    "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
}
"""A session that moves finds in a shared storage what it left a moment before, and waits for it."""
PRIORITIES = {
    "enable_priority_scheduling": "true",
    "disable_priority_preemption": "true",
    "default_priority_value": "0",
}
"""What waits in sglang is taken by priority; what runs is left alone, as in our own queue."""
POLICIES_WITH_PRIORITIES = ("fcfs", "lof")
DISTINCT_RANKS = ("dp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "nnodes")
"""Over 1, some ranks hold other tokens' KV, or slices of pages, under equal keys, or cannot reach
the pages in host memory."""
SLICED_PAGES = ("enable_prefill_cp", "enable_kv_cache_sharding", "enable_dsa_cache_layer_split")
"""Flags that do so."""


def canonical(given: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """The given arguments by sglang's own name for each. ``names`` are all that sglang knows, with
    underscores -> its own; an unambiguous beginning will do, as on its command line. Raises
    ValueError for an unknown one, and for one that is given twice."""
    found: dict[str, str] = {}
    for name, value in given.items():
        if name in names:
            own = {names[name]}
        else:
            own = {names[full] for full in names if full.startswith(name)}
        if len(own) != 1:
            raise ValueError(
                f"{name!r} is neither an option of this engine nor of sglang's server"
                + (f"; {', '.join(sorted(own)[:4])} … begin so" if own else "")
            )
        (dest,) = own
        if dest in found:
            raise ValueError(f"sglang's {dest} is given twice, as {name!r} too")
        found[dest] = value
    return found


def argument_values(
    config: SglangConfig,
    given: Mapping[str, str],
    folder: Path,
    *,
    socket: Path,
    events: str,
    replay: str,
    on_cpu: bool,
) -> dict[str, str]:
    """All arguments by sglang's own names. ``given`` are the user's, by the same; ``folder`` of
    the model, ``socket`` of the page desk, ``events`` and ``replay`` are addresses. Raises
    ValueError for one that is not for the user to set."""
    for name in given:
        refuse_argument(name, config.storage)
    values: dict[str, str] = {"log_level": "warning", "served_model_name": folder.name}
    if on_cpu:
        values |= CPU_DEFAULTS
        if "mem_fraction_static" not in given:
            values["max_total_tokens"] = CPU_MAX_TOTAL_TOKENS
    if given.get("schedule_policy", "fcfs") in POLICIES_WITH_PRIORITIES:
        values |= PRIORITIES
    if config.storage == "own" and "hicache_storage_backend" in given:
        values |= {**OWN_STORAGE_DEFAULTS, "enable_hierarchical_cache": "true"}
    values |= given
    values |= {
        "model_path": str(folder),
        "skip_tokenizer_init": "true",
        "stream_interval": "1",
        "incremental_streaming_output": "true",
        "max_running_requests": str(config.max_running),
        "page_size": str(config.page_size),
        "enable_session_radix_cache": "true",
        "kv_events_config": json.dumps(
            {"publisher": "zmq", "endpoint": events, "replay_endpoint": replay, "topic": TOPIC}
        ),
    }
    threshold = PREFETCH_THRESHOLD_PAGES * config.page_size
    if config.storage == "sessile":
        values |= _sessile_storage(socket, threshold)
    elif "hicache_storage_backend" in given:
        name = "hicache_storage_backend_extra_config"
        values[name] = _with_threshold(values.get(name, ""), threshold)
    return values


def _sessile_storage(socket: Path, threshold: int) -> dict[str, str]:
    return {
        "enable_hierarchical_cache": "true",
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(
            {
                "backend_name": "sessile",
                "module_path": "workers.engines.sglang.storage",
                "class_name": "SessileStorage",
                "socket": str(socket),
                "prefetch_threshold": threshold,
            }
        ),
    }


def _with_threshold(extra_config: str, threshold: int) -> str:
    """sglang looks for 256 tokens and more: shorter contexts would be computed. A file says for
    itself."""
    if extra_config.startswith("@"):
        return extra_config
    try:
        extra = json.loads(extra_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"hicache_storage_backend_extra_config is neither JSON nor @FILE: {error}"
        ) from error
    if not isinstance(extra, dict):
        raise ValueError("hicache_storage_backend_extra_config is not a JSON object")
    return json.dumps({"prefetch_threshold": threshold, **extra})


def refuse_foreign_ranks(arguments: Any) -> None:
    """Raises ValueError if sglang's ``ServerArgs`` make ranks whose pages are not parts of one page
    under one key. What sglang decides later the storage refuses (see its ``register_…``)."""
    advice = "must be {} where Sessile moves the KV: run one worker for each, or give storage=own"
    for name in DISTINCT_RANKS:
        if getattr(arguments, name) > 1:
            raise ValueError(f"{name} {advice.format(1)}")
    for name in SLICED_PAGES:
        if getattr(arguments, name):
            raise ValueError(f"{name} {advice.format('off')}")


def with_radix_cache(
    values: Mapping[str, str], supported: Collection[str], *, blackwell: bool
) -> dict[str, str]:
    """The same arguments, with an attention backend that has a prefix cache if the inference is to
    be deterministic: sglang's own choice on Blackwell has none. Raises ValueError for a given one
    that has none. ``supported`` are those that have."""
    if values.get("enable_deterministic_inference") != "true":
        return dict(values)
    backend = values.get("attention_backend")
    if backend is not None and backend not in supported:
        raise ValueError(
            f"deterministic inference with attention_backend={backend} has no prefix cache: give "
            f"one of {', '.join(sorted(supported))} (on a GPU), or leave it out"
        )
    return {**values, "attention_backend": "triton"} if blackwell and not backend else dict(values)
