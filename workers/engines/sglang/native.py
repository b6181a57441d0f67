"""What is asked of sglang itself before its engine starts: its command line, and the functions that
must agree with what its processes do. Imports sglang, so only once its version is checked."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from sglang.srt.arg_groups.choices import RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND
from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed
from sglang.srt.runtime_context import get_platform
from sglang.srt.server_args import ServerArgs

from workers.engines.sglang.arguments import (
    argument_values,
    canonical,
    refuse_foreign_ranks,
    with_radix_cache,
)
from workers.engines.sglang.config import SglangConfig

log = logging.getLogger(__name__)


def hash_pages(tokens: list[int], seed: str | None, page_size: int) -> list[str]:
    """sglang's storage keys of whole pages."""
    keys = get_hash_str(tokens, seed, page_size)
    assert isinstance(keys, list)
    return keys


def load_hash() -> None:
    """sglang's hash is an extension that is built, or at least loaded, when it is first used.
    Raises ValueError if it cannot be built."""
    try:
        hash_pages([0], None, 1)
    except RuntimeError as error:
        raise ValueError(
            f"{error} ({error.__cause__}): it is built once, which needs g++, ninja and OpenSSL's "
            "headers (libssl-dev)"
        ) from error


def namespace_seed(salt: str) -> str | None:
    """What the keys of a ``cache_salt`` are chained to."""
    seed: str | None = storage_namespace_seed(None, salt)
    return seed


def server_arguments(
    config: SglangConfig, folder: Path, socket: Path, events: str, replay: str
) -> ServerArgs:
    """Raises ValueError for an argument that sglang does not know, or that Sessile refuses. See
    :func:`workers.engines.sglang.arguments.argument_values`."""
    parser = argparse.ArgumentParser(prog="sglang", exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    names = {
        flag.lstrip("-").replace("-", "_"): action.dest
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and not flag.startswith("--no-")
    } | {action.dest: action.dest for action in parser._actions}
    given = canonical(dict(config.server_args), names)
    on_cpu = given.get("device", "").startswith("cpu") or (
        "device" not in given and not torch.accelerator.is_available()
    )
    if on_cpu:
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        if "device" not in given:
            log.warning("torch sees no accelerator: sglang computes on the CPU")
    values = argument_values(
        config, given, folder, socket=socket, events=events, replay=replay, on_cpu=on_cpu
    )
    if values.get("enable_deterministic_inference") == "true":
        platform = get_platform()
        values = with_radix_cache(
            values,
            RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
            blackwell=bool(platform.is_sm100 or platform.is_sm120),
        )
    arguments = _parse(parser, values)
    if config.storage == "sessile":
        refuse_foreign_ranks(arguments)
    return arguments


def _parse(parser: argparse.ArgumentParser, values: Mapping[str, str]) -> ServerArgs:
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # others of the same are deprecated
    argv: list[str] = []
    for name, value in values.items():
        argv += _words(actions[name], value)
    try:
        parsed = parser.parse_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"sglang refuses its arguments: {error}") from error
    parsed._radix_eviction_policy_explicitly_set = "radix_eviction_policy" in values
    return ServerArgs.from_cli_args(parsed)


def _words(action: argparse.Action, value: str) -> list[str]:
    """An argument as on a command line."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise ValueError(f"{action.dest} is a flag: true or false, not {value!r}")
        if value == "true":
            return [flag]
        return [no for no in action.option_strings if no.startswith("--no-")][:1]
    if action.nargs in ("+", "*"):
        return [flag, *shlex.split(value)]
    return [f"{flag}={value}"]
