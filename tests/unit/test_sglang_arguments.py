"""What sglang's server is told of what the user gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workers.engines.sglang.arguments import (
    argument_values,
    canonical,
    refuse_foreign_ranks,
    with_radix_cache,
)
from workers.engines.sglang.config import SglangConfig

NAMES = {
    "tp_size": "tp_size",
    "tensor_parallel_size": "tp_size",
    "enable_hicache": "enable_hierarchical_cache",
    "enable_hierarchical_cache": "enable_hierarchical_cache",
    "log_level": "log_level",
    "log_requests": "log_requests",
}
RANKS = {
    "dp_size": 1,
    "attn_dp_size": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "nnodes": 1,
    "enable_prefill_cp": False,
    "enable_kv_cache_sharding": False,
    "enable_dsa_cache_layer_split": False,
}
MOONCAKE = {"master_server_address": "store:50051", "protocol": "tcp"}


def values(*, on_cpu: bool = False, storage: str = "sessile", **given: Any) -> dict[str, str]:
    return argument_values(
        SglangConfig(storage=storage),
        given,
        Path("/models/llama"),
        socket=Path("/run/pages"),
        events="ipc:///run/events",
        replay="ipc:///run/replay",
        on_cpu=on_cpu,
    )


def canonical_values(given: dict[str, Any]) -> dict[str, str]:
    told: dict[str, Any] = canonical(given, NAMES)
    return values(**told)


def own(**given: Any) -> dict[str, str]:
    return values(storage="own", **given)


@pytest.mark.parametrize("name", ["tp_size", "tensor_parallel_size", "tp"])
def test_an_argument_goes_by_any_of_its_names(name: str) -> None:
    assert canonical({name: "2"}, NAMES) == {"tp_size": "2"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"no_such_thing": "1"}, "neither an option"),
        ({"log": "info"}, "log_level, log_requests"),
        ({"tp_size": "2", "tp": "4"}, "given twice"),
    ],
)
def test_an_unclear_name_is_refused(given: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        canonical(given, NAMES)


def test_what_sessile_sets_is_refused_by_another_name_too() -> None:
    with pytest.raises(ValueError, match="enable_hierarchical_cache is set by Sessile"):
        canonical_values({"enable_hicache": "true"})


def test_the_users_arguments_are_over_defaults_and_under_what_is_needed() -> None:
    told = values(on_cpu=True, dtype="bfloat16", log_level="info", tp_size="2")
    assert told["dtype"] == "bfloat16"
    assert told["log_level"] == "info"
    assert told["device"] == "cpu"
    assert told["enable_session_radix_cache"] == "true"
    assert told["hicache_storage_backend"] == "dynamic"
    assert "device" not in values()  # sglang finds its accelerator


def test_on_a_cpu_the_devices_kv_leaves_memory_for_its_copies() -> None:
    assert values(on_cpu=True)["max_total_tokens"] == "32768"
    assert values(on_cpu=True, max_total_tokens="512")["max_total_tokens"] == "512"
    assert "max_total_tokens" not in values(on_cpu=True, mem_fraction_static="0.2")
    assert "max_total_tokens" not in values()


def test_equal_models_in_different_folders_share_a_storage() -> None:
    assert values()["served_model_name"] == "llama"
    assert values(served_model_name="other")["served_model_name"] == "other"


def test_waiting_requests_go_by_priority_and_running_ones_are_left_alone() -> None:
    told = values()
    assert told["enable_priority_scheduling"] == told["disable_priority_preemption"] == "true"
    assert "enable_priority_scheduling" not in values(schedule_policy="lpm")  # sglang forbids both


def test_a_shared_storage_is_written_at_once_and_waited_for() -> None:
    told = own(
        hicache_storage_backend="mooncake",
        hicache_storage_backend_extra_config=json.dumps(MOONCAKE),
        hicache_mem_layout="page_first",
    )
    assert told["hicache_write_policy"] == "write_through"
    assert told["hicache_storage_prefetch_policy"] == "wait_complete"
    assert told["enable_hierarchical_cache"] == "true"
    assert told["hicache_mem_layout"] == "page_first"
    extra = json.loads(told["hicache_storage_backend_extra_config"])
    assert extra == {**MOONCAKE, "prefetch_threshold": 16}


def test_a_storage_without_settings_gets_the_threshold() -> None:
    told = own(hicache_storage_backend="nixl")
    assert json.loads(told["hicache_storage_backend_extra_config"]) == {"prefetch_threshold": 16}


def test_the_users_settings_of_a_storage_win() -> None:
    extra = '{"plugin": {"posix": {"active": true}}, "prefetch_threshold": 512}'
    told = own(
        hicache_storage_backend="nixl",
        hicache_storage_backend_extra_config=extra,
        hicache_storage_prefetch_policy="best_effort",
        hicache_write_policy="write_through_selective",
    )
    assert json.loads(told["hicache_storage_backend_extra_config"]) == json.loads(extra)
    assert told["hicache_storage_prefetch_policy"] == "best_effort"
    assert told["hicache_write_policy"] == "write_through_selective"


def test_a_file_of_settings_is_left_to_sglang() -> None:
    told = own(
        hicache_storage_backend="mooncake", hicache_storage_backend_extra_config="@/etc/store.toml"
    )
    assert told["hicache_storage_backend_extra_config"] == "@/etc/store.toml"


@pytest.mark.parametrize("extra", ["{", "[1]"])
def test_settings_that_are_no_object_are_refused(extra: str) -> None:
    with pytest.raises(ValueError, match="hicache_storage_backend_extra_config"):
        own(hicache_storage_backend="mooncake", hicache_storage_backend_extra_config=extra)


def test_no_storage_at_all_is_possible() -> None:
    told = own()
    assert "enable_hierarchical_cache" not in told
    assert "hicache_storage_backend" not in told


@pytest.mark.parametrize("name", ["dp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "nnodes"])
def test_ranks_with_other_pages_under_equal_keys_are_refused(name: str) -> None:
    refuse_foreign_ranks(SimpleNamespace(**RANKS))
    with pytest.raises(ValueError, match=f"{name} must be 1"):
        refuse_foreign_ranks(SimpleNamespace(**{**RANKS, name: 2}))


def test_ranks_with_slices_of_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="enable_prefill_cp must be off"):
        refuse_foreign_ranks(SimpleNamespace(**{**RANKS, "enable_prefill_cp": True}))


def test_a_field_that_sglang_has_renamed_is_noticed() -> None:
    with pytest.raises(AttributeError):
        refuse_foreign_ranks(SimpleNamespace(dp_size=1))


@pytest.mark.parametrize(
    ("given", "blackwell", "expected"),
    [
        ({}, False, None),
        ({}, True, "triton"),
        ({"attention_backend": "fa4"}, True, "fa4"),
    ],
)
def test_deterministic_inference_has_a_prefix_cache(
    given: dict[str, str], blackwell: bool, expected: str | None
) -> None:
    exact = {"enable_deterministic_inference": "true", **given}
    told = with_radix_cache(exact, ["fa3", "fa4", "triton"], blackwell=blackwell)
    assert told.get("attention_backend") == expected
    assert with_radix_cache(given, ["fa3"], blackwell=blackwell) == given


def test_deterministic_inference_without_a_prefix_cache_is_refused() -> None:
    exact = {"enable_deterministic_inference": "true", "attention_backend": "flashinfer"}
    with pytest.raises(ValueError, match="no prefix cache: give one of fa3, triton"):
        with_radix_cache(exact, ["triton", "fa3"], blackwell=True)
