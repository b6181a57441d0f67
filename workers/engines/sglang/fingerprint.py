"""What makes the KV pages of two sglang replicas exchangeable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.engines.model_store import weights_digest

LAYOUT_VERSION = 1
"""Of a page as this engine stores it."""
HARMLESS = frozenset(
    {
        # In the fingerprint by themselves, or what Sessile sets.
        "model_path",
        "dtype",
        "page_size",
        "skip_tokenizer_init",
        "stream_interval",
        "incremental_streaming_output",
        "kv_events_config",
        "enable_hierarchical_cache",
        "enable_session_radix_cache",
        # Where KV is kept. The layout of pages is taken as it is resolved.
        "hicache_ratio",
        "hicache_size",
        "hicache_host_memory_fraction",
        "hicache_io_backend",
        "hicache_mem_layout",
        "hicache_write_policy",
        "hicache_storage_backend",
        "hicache_storage_backend_extra_config",
        "hicache_storage_prefetch_policy",
        "hicache_storage_prefetch_retry_max_attempts",
        "hicache_storage_prefetch_retry_poll_interval",
        "radix_eviction_policy",
        "radix_eviction_policy_config",
        "_radix_eviction_policy_explicitly_set",
        # How much there is, and what runs when.
        "mem_fraction_static",
        "max_total_tokens",
        "max_running_requests",
        "max_queued_requests",
        "max_prefill_tokens",
        "chunked_prefill_size",
        "num_continuous_decode_steps",
        "schedule_policy",
        "schedule_conservativeness",
        "schedule_low_priority_values_first",
        "enable_priority_scheduling",
        "disable_priority_preemption",
        "default_priority_value",
        "retraction_policy",
        "scheduler_recv_interval",
        "disable_overlap_schedule",
        "sleep_on_idle",
        "disable_cuda_graph",
        "disable_cuda_graph_padding",
        "disable_decode_cuda_graph",
        "cuda_graph_bs_decode",
        "cuda_graph_max_bs_decode",
        # Sampling comes after the KV.
        "random_seed",
        "sampling_backend",
        "sampling_defaults",
        "preferred_sampling_params",
        "grammar_backend",
        # How it is loaded, not what.
        "download_dir",
        "model_checksum",
        "revision",
        "weight_loader_disable_mmap",
        "weight_loader_drop_cache_after_load",
        "weight_loader_prefetch_checkpoints",
        "weight_loader_prefetch_num_threads",
        # Texts, names and the HTTP server's.
        "served_model_name",
        "tokenizer_path",
        "tokenizer_mode",
        "tokenizer_backend",
        "chat_template",
        "reasoning_parser",
        "tool_call_parser",
        "api_key",
        "admin_api_key",
        "weight_version",
        # Where its processes are, and how they are watched.
        "base_gpu_id",
        "gpu_id_step",
        "numa_node",
        "nccl_port",
        "dist_init_addr",
        "dist_timeout",
        "watchdog_timeout",
        "soft_watchdog_timeout",
        "crash_dump_folder",
        "gc_threshold",
        "gc_warning_threshold_secs",
        "log_level",
        "log_level_http",
        "log_requests",
        "log_requests_format",
        "log_requests_level",
        "log_requests_target",
        "decode_log_interval",
        "show_time_cost",
        "enable_trace",
        "otlp_traces_endpoint",
        "otlp_service_name",
        "trace_modules",
        "enable_metrics",
        "enable_metrics_for_all_schedulers",
        "enable_mfu_metrics",
        "enable_cache_report",
        "enable_request_time_stats_logging",
        "export_metrics_to_file",
        "export_metrics_to_file_dir",
        "extra_metric_labels",
        "bucket_time_to_first_token",
        "bucket_inter_token_latency",
        "bucket_e2e_request_latency",
        "load_publish_endpoint",
        "load_snapshot_publish_interval",
    }
)
"""sglang's arguments that leave the KV of given tokens as it is. One that is not here makes another
fingerprint: then a session is recomputed, and never goes on from wrong KV."""
RESOLVED = ("device", "kv_cache_dtype", "quantization", "hicache_mem_layout")
"""Of what sglang makes of its arguments: these as well."""
RESOLVED_WHERE_BITS_COUNT = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
)
"""The same with deterministic inference, which promises more than equality but for rounding."""


def shaping_arguments(
    given: Mapping[str, Any], defaults: Mapping[str, Any], resolved: Mapping[str, Any]
) -> dict[str, str]:
    """The part of sglang's arguments that decides what its KV is; ``resolved`` is what sglang made
    of them. A file or folder counts with its contents (which are read), not with its name."""
    shaping = {
        name: _described(value)
        for name, value in given.items()
        if name not in HARMLESS and value != defaults.get(name)
    }
    bits_count = resolved["enable_deterministic_inference"]
    names = (*RESOLVED, *(RESOLVED_WHERE_BITS_COUNT if bits_count else ()))
    return shaping | {f"resolved {name}": _described(resolved[name]) for name in names}


def kv_fingerprint(
    folder: Path,
    arguments: Mapping[str, str],
    *,
    version: str,
    dtype: str,
    layout: str,
    page_size: int,
) -> bytes:
    """16 bytes over weights, configuration, arguments (see :func:`shaping_arguments`), dtype, page
    size, layout and sglang's version. Reads the weights."""
    config = json.loads((folder / "config.json").read_text())
    incidental = {"transformers_version", "dtype", "torch_dtype"}
    architecture = {k: v for k, v in config.items() if k not in incidental and k[0] != "_"}
    what = [
        "sglang",
        version,
        architecture,
        # Weights with scales of their own say so beside them.
        {path.name: _digest(path) for path in sorted(folder.glob("hf_quant_config.json"))},
        weights_digest(folder),
        dict(arguments),
        dtype,
        layout,
        page_size,
        LAYOUT_VERSION,
    ]
    text = json.dumps(what, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv-fingerprint").digest()


def _described(value: Any) -> str:
    if isinstance(value, str):
        path = Path(value.removeprefix("@"))
        try:
            if path.is_file():
                return f"file {_digest(path)}"
            if value and path.is_dir():
                return f"folder {weights_digest(path)}"
        except OSError:
            pass  # no path: too long for one
    return json.dumps(value, sort_keys=True, default=str)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
