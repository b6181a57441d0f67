"""Makes the torch engine and its model's codec from text options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from workers.engines.model_store import model_folder
from workers.engines.registry import Backend, parse_options
from workers.engines.torch.config import TorchEngineConfig
from workers.engines.torch.engine import TorchEngine
from workers.text.hf_codec import load_hf_codec


def create_backend(options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Options are the fields of TorchEngineConfig. Converts the bundled model if that has not been
    done yet; raises ModelUnavailable."""
    config = parse_options(TorchEngineConfig, options)
    folder = model_folder(config.model)
    engine = TorchEngine(dataclasses.replace(config, model=str(folder)), clock)
    return Backend(engine, load_hf_codec(folder, lambda: datetime.now(UTC)))
