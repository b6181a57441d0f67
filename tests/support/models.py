"""The bundled model for tests that need the real weights or tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.engines.model_store import ModelUnavailable, model_folder


def bundled_model() -> Path:
    """Its folder, converted if need be. Without it the test is skipped; in CI it fails."""
    try:
        return model_folder()
    except ModelUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the bundled model: {error}")
        pytest.skip(str(error))
