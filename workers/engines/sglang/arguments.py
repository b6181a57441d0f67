"""sglang's server arguments as Sessile needs them, and the functions of sglang that must agree with
what its processes do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

from workers.engines.sglang.config import SglangConfig
from workers.engines.sglang.events import TOPIC

PREFETCH_THRESHOLD_PAGES = 1
"""Pages in host memory that are worth a look, at least."""
CPU_DEFAULTS = {
    "attention_backend": "torch_native",
    "dtype": "float32",
    "sleep_on_idle": "true",
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "layer_first",
}


OWN_STORAGE_DEFAULTS = {
    "hicache_write_policy": "write_through",
    "hicache_storage_prefetch_policy": "wait_complete",
}
"""A session that moves finds in a shared storage what it left a moment before, and waits for it."""


def hash_pages(tokens: list[int], seed: str | None, page_size: int) -> list[str]:
    """sglang's storage keys of whole pages."""
    keys = get_hash_str(tokens, seed, page_size)
    assert isinstance(keys, list)
    return keys


def namespace_seed(salt: str) -> str | None:
    """What the keys of a ``cache_salt`` are chained to."""
    seed: str | None = storage_namespace_seed(None, salt)
    return seed


def server_arguments(
    config: SglangConfig, folder: Path, socket: Path, events: str, replay: str
) -> Any:
    """sglang's ``ServerArgs``. Raises ValueError for an argument that sglang does not know."""
    given = dict(config.server_args)
    if not _has_gpu() and given.get("device", "cpu") == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        given = {"device": "cpu", **CPU_DEFAULTS, **given}
    values = {
        **given,
        "model_path": str(folder),
        "skip_tokenizer_init": "true",
        "stream_interval": "1",
        "incremental_streaming_output": "true",
        "max_running_requests": str(config.max_running),
        "page_size": str(config.page_size),
        "enable_session_radix_cache": "true",
        "log_level": given.get("log_level", "warning"),
        "kv_events_config": json.dumps(
            {
                "publisher": "zmq",
                "endpoint": events,
                "replay_endpoint": replay,
                "topic": TOPIC,
            }
        ),
    }
    if config.storage == "sessile":
        values |= {
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
                    "prefetch_threshold": PREFETCH_THRESHOLD_PAGES * config.page_size,
                }
            ),
        }
    elif "hicache_storage_backend" in given:
        values = {**OWN_STORAGE_DEFAULTS, **values, "enable_hierarchical_cache": "true"}
    arguments = _parse(values)
    if config.storage == "sessile":
        _refuse_foreign_ranks(arguments)
    return arguments


def _refuse_foreign_ranks(arguments: Any) -> None:
    """Ranks that hold other tokens' KV, or slices of pages, under equal keys."""
    for name in ("dp_size", "attn_cp_size", "dcp_size"):
        if getattr(arguments, name, 1) > 1:
            raise ValueError(
                f"{name} must be 1 where Sessile moves the KV: run one worker for each, or give "
                "storage=own"
            )


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _parse(values: dict[str, str]) -> Any:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang", exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    actions = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for name, value in values.items():
        action = actions.get(name)
        if action is None:
            raise ValueError(f"{name!r} is neither an option of this engine nor of sglang's server")
        flag = action.option_strings[0]
        if action.nargs == 0:
            if value not in ("true", "false"):
                raise ValueError(f"{name} is a flag: true or false, not {value!r}")
            argv += [flag] if value == "true" else []
        else:
            argv += [flag, value]
    try:
        parsed = parser.parse_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"sglang refuses its arguments: {error}") from error
    parsed._radix_eviction_policy_explicitly_set = "radix_eviction_policy" in values
    return ServerArgs.from_cli_args(parsed)
