"""Makes the engine for an sglang server from text options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from workers.engines.model_store import model_folder
from workers.engines.registry import Backend, parse_options
from workers.engines.sglang_server.config import SglangServerConfig
from workers.engines.sglang_server.engine import SglangServerEngine
from workers.text.hf_codec import load_hf_codec


def create_backend(options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Options are the fields of SglangServerConfig; ``url`` and ``model`` must be given."""
    del clock
    for name in ("url", "model"):
        if name not in options:
            raise ValueError(f"the sglang-server engine needs --engine-option {name}=…")
    config = parse_options(SglangServerConfig, options)
    folder = model_folder(config.model)
    codec = load_hf_codec(folder, lambda: datetime.now(UTC))
    return Backend(SglangServerEngine(config, folder), codec)
