"""What a process would run with, setting by setting, as it may be shown to people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.cli.schema import Group, Table, schema, settings
from gateway.cli.settings import MASK, UNSET, Loaded, masked

DEFAULT = "default"
"""Origin of what nobody set."""


@dataclasses.dataclass(frozen=True, slots=True)
class Effective:
    """One setting as a process would have it; secrets are masked."""

    setting: str
    value: Any
    origin: str


def effective(process: str, loaded: Loaded) -> Iterator[Effective]:
    """Every setting of a configuration; one value each for what is in tables."""
    for path, node in settings(schema(process)):
        if "*" in path or isinstance(node, Group):
            continue
        value = _at(loaded.config, path)
        if isinstance(node, Table) and node.pairs:
            value = dict(value)
        origins = {
            origin for given, origin in loaded.origins.items() if given[1 : len(path) + 1] == path
        }
        origin = ", ".join(sorted(origins)) or DEFAULT
        if value == UNSET:
            origin = "must be set"
        yield Effective(".".join((process, *path)), masked(node, _plain(value)), origin)


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = None if config is None else getattr(config, name)
    return config


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; dataclasses in tables become objects without their secrets."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: MASK if field.metadata.get("secret") else _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return value
