"""What the workers of a fleet host: the sim engine, or the torch engine with a tiny model.

python -m tests.faults.engines FOLDER      writes that model
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.engines.sim.config import SimConfig, SimTiming

ENGINE = SimConfig(
    page_size=16,
    capacity_pages=4096,
    max_context_tokens=32_768,
    max_running=16,
    max_queued=16,
    eos_probability=1 / 400,
    timing=SimTiming(step_ms=15, max_prefill_tokens=512),
)
VOCAB_SIZE = 512
"""Of the tiny model: the test tokenizer has somewhat less."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """An engine by name. ``options``: its own, as text, made in a directory of the fleet."""

    name: str
    options: Callable[[Path], dict[str, str]]
    max_context_tokens: int
    knows_its_tokens: bool
    """What it must say after a context can be computed without it."""


def _sim(_: Path) -> dict[str, str]:
    values = {
        "page_size": ENGINE.page_size,
        "capacity_pages": ENGINE.capacity_pages,
        "max_context_tokens": ENGINE.max_context_tokens,
        "max_running": ENGINE.max_running,
        "max_queued": ENGINE.max_queued,
        "eos_probability": ENGINE.eos_probability,
        "step_ms": ENGINE.timing.step_ms,
        "max_prefill_tokens": ENGINE.timing.max_prefill_tokens,
    }
    return {name: str(value) for name, value in values.items()}


def _torch(directory: Path) -> dict[str, str]:
    """The model is written by a process of its own: torch stays out of this one."""
    folder = directory / "model"
    if not folder.exists():
        command = [sys.executable, "-m", "tests.faults.engines", str(folder)]
        subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL)
    return {"model": str(folder), "device": "cpu", "kv_pages": "512"}


SIM = Hosted("sim", _sim, ENGINE.max_context_tokens, knows_its_tokens=True)
TORCH = Hosted("torch", _torch, 2048, knows_its_tokens=False)


def _write_tiny_model(folder: Path) -> None:
    from tests.support.tiny_llama import tiny_llama
    from tests.support.tokenizers import template, write_model_folder

    shutil.copytree(tiny_llama(vocab_size=VOCAB_SIZE), folder)
    write_model_folder(folder, template("chatml"))


if __name__ == "__main__":
    _write_tiny_model(Path(sys.argv[1]))
