"""What sglang makes of its command line. No engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.engines.model_store import model_folder
from workers.engines.sglang import arguments, config, fingerprint
from workers.engines.sglang.config import SglangConfig

pytestmark = pytest.mark.essential


def parsed(**options: str) -> Any:
    from workers.engines.sglang.native import server_arguments

    return server_arguments(
        SglangConfig.from_options(options),
        model_folder(),
        Path("/run/pages"),
        "ipc:///run/events",
        "ipc:///run/replay",
    )


def test_every_name_that_is_relied_on_is_sglangs() -> None:
    from sglang.srt.server_args import ServerArgs, record_fields

    fields = {field.name for field in record_fields(ServerArgs)} | {"config"}
    ours = {
        *config.OWNED,
        *config.STORAGE_ARGUMENTS,
        *config.REFUSED,
        *arguments.CPU_DEFAULTS,
        *arguments.OWN_STORAGE_DEFAULTS,
        *arguments.PRIORITIES,
        *arguments.DISTINCT_RANKS,
        *arguments.SLICED_PAGES,
        *fingerprint.HARMLESS,
        *fingerprint.RESOLVED,
        *fingerprint.RESOLVED_WHERE_BITS_COUNT,
    }
    assert sorted(ours - fields) == []


@pytest.mark.parametrize("name", ["tp", "tp_size", "tensor_parallel_size"])
def test_all_names_of_an_argument_are_one(name: str) -> None:
    assert parsed(**{name: "2"}).tp_size == 2


def test_values_reach_sglang_as_they_are_meant() -> None:
    told = parsed(
        dllm_fdfo="false",
        enable_metrics="false",
        log_requests_target="stdout /var/log/requests",
        schedule_conservativeness="0.5",
    )
    assert told.dllm_fdfo is told.enable_metrics is False
    assert told.log_requests_target == ["stdout", "/var/log/requests"]
    assert told.schedule_conservativeness == 0.5
    assert told.enable_priority_scheduling is told.disable_priority_preemption is True


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"enable_hicache": "true"}, "enable_hierarchical_cache is set by Sessile"),
        ({"no_such_thing": "1"}, "no_such_thing"),
        ({"tp_size": "two"}, "invalid int value"),
        ({"enable_metrics": "yes"}, "true or false"),
        ({"dp": "2"}, "dp_size must be 1"),
        ({"attn_dp_size": "2", "tp": "2"}, "attn_dp_size must be 1"),
        ({"speculative_algo": "EAGLE"}, "storage=own"),
        ({"enable_deterministic_inference": "true"}, "no prefix cache"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parsed(**options)


def test_equal_arguments_in_other_words_shape_the_same_kv() -> None:
    from workers.engines.sglang.runtime import _shaping

    usual = _shaping(parsed())
    assert _shaping(parsed(tp_size="1", log_level="info", max_total_tokens="99")) == usual
    assert _shaping(parsed(load_format="dummy")) != usual
