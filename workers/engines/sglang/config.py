"""Settings of the sglang engine: ours, and any server argument of sglang's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from workers.engines.model_store import BUNDLED_MODEL
from workers.engines.registry import parse_options
from workers.engines.sglang_requests.generations import SGLANG_VERSIONS

OWNED = frozenset(
    {
        "model_path",
        "host",
        "port",
        "skip_tokenizer_init",
        "stream_interval",
        "incremental_streaming_output",
        "enable_streaming_session",
        "enable_session_radix_cache",
        "disable_radix_cache",
        "kv_events_config",
        "max_running_requests",
        "page_size",
        "enable_hierarchical_cache",
        "abort_on_priority_when_disabled",
        "schedule_low_priority_values_first",
    }
)
"""sglang's arguments that Sessile sets itself, or whose defaults it needs."""
STORAGE_ARGUMENTS = frozenset(
    {
        "hicache_storage_backend",
        "hicache_storage_backend_extra_config",
        "hicache_write_policy",
        "hicache_storage_prefetch_policy",
        "hicache_host_memory_mode",
        "enable_lmcache",
        "enable_flexkv",
        "enable_unified_cache_external_linker",
    }
)
"""The same, where Sessile moves the KV itself."""
REFUSED = {
    "config": "is read by sglang's own launcher only: give its arguments here",
    "disaggregation_mode": "has prefill and decode in different servers, which a replica is not",
    "use_ray": "starts its processes out of the worker's reach: leave it out",
}
"""Arguments that no replica can have -> why not."""


def refuse_argument(name: str, storage: str) -> None:
    """Raises ValueError for an argument of sglang's that is not for its users to set here."""
    if name in OWNED:
        raise ValueError(f"sglang's {name} is set by Sessile: leave it out")
    if name in REFUSED:
        raise ValueError(f"sglang's {name} {REFUSED[name]}")
    if storage != "sessile":
        return
    if name in STORAGE_ARGUMENTS:
        raise ValueError(
            f"{name} is sglang's choice of a storage: with storage=own it may be given, "
            "then Sessile moves no KV itself"
        )
    if name == "speculative_algorithm":
        raise ValueError(
            "speculative decoding has KV of another shape and under other names than Sessile moves:"
            " give storage=own, or leave speculative_algorithm out"
        )


def check_version(version: str) -> None:
    """Raises ValueError for a version that this engine was not read against."""
    if version not in SGLANG_VERSIONS:
        wanted = ", ".join(SGLANG_VERSIONS)
        raise ValueError(
            f"sglang {version} is installed; this engine needs {wanted}: "
            f"pip install 'sglang=={SGLANG_VERSIONS[-1]}'"
        )


@dataclass(frozen=True, slots=True)
class SglangConfig:
    """Refuses contradictions when it is made (ValueError)."""

    model: str = BUNDLED_MODEL
    """The bundled model's name, or the path of a Hugging Face folder."""
    page_size: int = 16
    """Tokens in a KV page."""
    host_memory_mb: int | None = None
    """For the pages in host memory (MiB) that peers may have; at least as much as the device's,
    which is the default."""
    host_pages: int | None = None
    """Pages in host memory, instead of ``host_memory_mb``."""
    max_running: int = 16
    """Generations that sglang is given at once."""
    max_queued: int = 256
    """Generations that wait; over it ``submit`` refuses."""
    max_context_tokens: int | None = None
    """At most this much of what the model allows."""
    storage: str = "sessile"
    """Who keeps KV in host memory and moves it: ``sessile``, or ``own``: whatever storage the
    server arguments name (``hicache_storage_backend=mooncake``, ``nixl`` …), or none."""
    start_timeout_s: float = 600.0
    server_args: tuple[tuple[str, str], ...] = ()
    """sglang's own arguments as text, with underscores, by any of their names; flags are ``true``
    or ``false``, several values are one text as in a shell."""

    def __post_init__(self) -> None:
        for name in ("page_size", "host_memory_mb", "host_pages", "max_running", "max_queued"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.storage not in ("sessile", "own"):
            raise ValueError(f"storage {self.storage!r} is not one of sessile, own")
        for name, _ in self.server_args:
            refuse_argument(name, self.storage)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> SglangConfig:
        """From text options: this config's own fields, and anything else is an argument of
        sglang's (checked when the engine starts)."""
        normal = {name.replace("-", "_"): value for name, value in options.items()}
        own = {field.name for field in dataclasses.fields(cls)} - {"server_args"}
        mine = {name: value for name, value in normal.items() if name in own}
        rest = tuple((name, value) for name, value in normal.items() if name not in own)
        return dataclasses.replace(parse_options(cls, mine), server_args=rest)
