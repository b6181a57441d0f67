"""What makes the KV pages of two sglang replicas exchangeable."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from workers.engines.model_store import weights_digest
from workers.engines.sglang.runtime import Facts

LAYOUT_VERSION = 1
"""Of a page as this engine stores it."""


def kv_fingerprint(folder: Path, facts: Facts, layout: str, page_size: int) -> bytes:
    """16 bytes over weights, configuration, dtype, page size, layout, parallelism and version.
    Reads the weights."""
    config = json.loads((folder / "config.json").read_text())
    incidental = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    architecture = {k: v for k, v in config.items() if k not in incidental and k[0] != "_"}
    what = [
        "sglang",
        version("sglang"),
        architecture,
        weights_digest(folder),
        facts.dtype,
        facts.parallelism,
        layout,
        page_size,
        LAYOUT_VERSION,
    ]
    text = json.dumps(what, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv-fingerprint").digest()
