"""What can be asked of the sglang engine on a command line, and what is refused."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest
import typer

from gateway.cli.serve import parse_options
from workers.engines.registry import create_backend
from workers.engines.sglang.config import SglangConfig, check_version
from workers.engines.sglang_requests.generations import SGLANG_VERSIONS


def test_arguments_after_the_dashes_are_options_too() -> None:
    words = ["--tp-size", "2", "--enable-metrics", "--dtype=float32", "--log-level", "info"]
    assert parse_options(["page_size=32"], "m", words) == (
        ("model", "m"),
        ("page_size", "32"),
        ("tp_size", "2"),
        ("enable_metrics", "true"),
        ("dtype", "float32"),
        ("log_level", "info"),
    )


@pytest.mark.parametrize("words", [["tp-size", "2"], ["-x"], ["--"], ["--tp-size", "2", "3"]])
def test_what_is_no_argument_is_refused(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match="--name value"):
        parse_options(None, "", words)


def test_own_options_are_kept_apart_from_those_of_the_server() -> None:
    config = SglangConfig.from_options(
        {"model": "m", "host-pages": "9", "mem_fraction_static": ".8"}
    )
    assert (config.model, config.host_pages) == ("m", 9)
    assert config.server_args == (("mem_fraction_static", ".8"),)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"port": "1"}, "set by Sessile"),
        ({"page-size": "0"}, "at least 1"),
        ({"host_pages": "0"}, "at least 1"),
        ({"storage": "nowhere"}, "sessile, own"),
        ({"hicache_storage_backend": "mooncake"}, "storage=own"),
        ({"max_running": "many"}, "must be int"),
        ({"host_memory_mb": "0"}, "at least 1"),
        ({"enable_session_radix_cache": "false"}, "set by Sessile"),
        ({"hicache_storage_prefetch_policy": "timeout"}, "storage=own"),
        ({"hicache_host_memory_mode": "buffer_only"}, "storage=own"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding.*storage=own"),
        ({"config": "file.yaml"}, "launcher"),
        ({"storage": "own", "disaggregation_mode": "prefill"}, "different servers"),
    ],
)
def test_contradictions_are_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SglangConfig.from_options(options)


def test_a_storage_of_its_own_may_be_named() -> None:
    options = {"storage": "own", "hicache_storage_backend": "mooncake"}
    assert SglangConfig.from_options(options).server_args == (
        ("hicache_storage_backend", "mooncake"),
    )


def test_speculative_decoding_needs_a_storage_of_its_own() -> None:
    SglangConfig.from_options({"storage": "own", "speculative_algorithm": "EAGLE"})


def test_another_version_is_refused_before_anything_of_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.engines.sglang import backend

    monkeypatch.setattr(backend, "version", lambda name: "0.4.1")
    monkeypatch.setitem(sys.modules, "sglang", None)  # its import would fail
    with pytest.raises(ValueError, match=r"sglang 0\.4\.1 is installed; this engine needs"):
        create_backend("sglang", {}, lambda: 0.0)


def test_without_sglang_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engines.sglang import backend

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", nothing)
    with pytest.raises(ImportError, match=r"pip install 'sessile-server\[sglang\]'"):
        create_backend("sglang", {}, lambda: 0.0)


def test_another_version_is_refused_with_what_to_install() -> None:
    check_version(SGLANG_VERSIONS[0])
    with pytest.raises(ValueError, match="pip install 'sglang=="):
        check_version("0.4.1")
