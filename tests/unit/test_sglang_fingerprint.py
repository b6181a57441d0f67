"""Which replicas may have each other's KV, and by which names it goes in a storage they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers.engines.sglang.fingerprint import kv_fingerprint, shaping_arguments
from workers.engines.sglang_requests.generations import namespace_of, salt_of

DEFAULTS: dict[str, Any] = {
    "tp_size": 1,
    "load_format": "auto",
    "json_model_override_args": "{}",
    "log_level": "",
}
RESOLVED: dict[str, Any] = {
    "device": "cuda",
    "kv_cache_dtype": "auto",
    "quantization": None,
    "hicache_mem_layout": "page_first",
    "attention_backend": "fa3",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "enable_deterministic_inference": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a model."""
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 2, "_name": "here"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def fingerprint(folder: Path, resolved: dict[str, Any] | None = None, **given: Any) -> bytes:
    arguments = shaping_arguments({**DEFAULTS, **given}, DEFAULTS, {**RESOLVED, **(resolved or {})})
    return kv_fingerprint(
        folder, arguments, version="0.5.23", dtype="bfloat16", layout="L", page_size=16
    )


@pytest.mark.parametrize(
    "given",
    [
        {"tp_size": 2},
        {"load_format": "dummy"},
        {"json_model_override_args": '{"rope_theta": 1e6}'},
        {"what_the_next_version_brings": True},
    ],
)
def test_an_argument_that_may_change_the_kv_makes_another_fingerprint(
    folder: Path, given: dict[str, Any]
) -> None:
    assert fingerprint(folder, **given) != fingerprint(folder)
    assert fingerprint(folder, **given) == fingerprint(folder, **given)


def test_what_leaves_the_kv_as_it_is_does_not(folder: Path) -> None:
    ours: dict[str, Any] = {
        "log_level": "info",
        "mem_fraction_static": 0.8,
        "kv_events_config": "ipc:///tmp/x",
    }
    assert fingerprint(folder, tp_size=1, **ours) == fingerprint(folder)


@pytest.mark.parametrize(
    "resolved", [{"kv_cache_dtype": "fp8_e4m3"}, {"hicache_mem_layout": "layer_first"}]
)
def test_what_sglang_decides_counts(folder: Path, resolved: dict[str, Any]) -> None:
    assert fingerprint(folder, resolved) != fingerprint(folder)


def test_the_backend_that_sglang_chose_counts_where_bits_are_promised(folder: Path) -> None:
    other = {"attention_backend": "triton"}
    assert fingerprint(folder, other) == fingerprint(folder)
    exact: dict[str, Any] = {"enable_deterministic_inference": True}
    assert fingerprint(folder, exact | other) != fingerprint(folder, exact)


def test_a_file_counts_with_its_contents(folder: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text("1")
    before = fingerprint(folder, quantization_param_path=str(scales))
    scales.write_text("2")
    assert fingerprint(folder, quantization_param_path=str(scales)) != before


def test_weights_configuration_and_their_scales_count(folder: Path) -> None:
    seen = {fingerprint(folder)}
    (folder / "hf_quant_config.json").write_text('{"kv_cache_quant_algo": "FP8"}')
    seen.add(fingerprint(folder))
    (folder / "model.safetensors").write_bytes(b"others")
    seen.add(fingerprint(folder))
    (folder / "config.json").write_text(json.dumps({"num_layers": 3}))
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_where_the_model_lies_does_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"num_layers": 2, "_name": "there"}))
    assert fingerprint(folder, model_path="/elsewhere") == before


def test_a_salt_names_the_namespace_and_the_kv() -> None:
    assert salt_of(b"tenant", b"one") != salt_of(b"tenant", b"other")
    assert namespace_of(salt_of(b"tenant", b"one")) == b"tenant"
    assert namespace_of(salt_of(b"tenant")) == b"tenant"
    assert namespace_of("somebody else's") is None
