"""Makes the sglang engine and its model's codec from text options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version

from workers.engines.model_store import model_folder
from workers.engines.registry import Backend
from workers.engines.sglang.config import SglangConfig, check_version
from workers.text.hf_codec import load_hf_codec


def create_backend(options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Options are the fields of SglangConfig and any server argument of sglang's. Raises
    ImportError if there is no sglang, ValueError for another version than this engine needs."""
    check_version(version("sglang"))
    # Not before: what this imports of sglang another version may not have.
    from workers.engines.sglang.engine import SglangEngine

    config = SglangConfig.from_options(options)
    folder = model_folder(config.model)
    return Backend(
        SglangEngine(config, folder, clock), load_hf_codec(folder, lambda: datetime.now(UTC))
    )
