"""Engines by name, each with the text codec that speaks its vocabulary; loaded when asked for.

Naming an engine must not import it: torch alone takes seconds, and may not be installed. An
engine's folder has a module ``backend`` with ``create_backend(options, clock)``.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

from workers.engines.port import Engine
from workers.text.port import TextCodec

ENGINES = {
    "sglang": "workers.engines.sglang.backend",
    "sglang-server": "workers.engines.sglang_server.backend",
    "sim": "workers.engines.sim.backend",
    "torch": "workers.engines.torch.backend",
}
"""Name -> module."""

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Backend:
    """What a replica hosts: an engine that is not started yet, and its codec."""

    engine: Engine
    codec: TextCodec


def create_backend(name: str, options: Mapping[str, str], clock: Callable[[], float]) -> Backend:
    """Makes the engine ``name`` with its own options (text, as from a command line). ``clock``
    gives monotonic seconds. Raises ValueError for an unknown engine, an unknown option or a bad
    value, and ImportError with advice if the engine's packages are missing."""
    module_name = ENGINES.get(name)
    if module_name is None:
        raise ValueError(f"engine {name!r} is not one of {', '.join(sorted(ENGINES))}")
    try:
        backend = importlib.import_module(module_name).create_backend(options, clock)
    except ImportError as error:
        raise ImportError(
            f"the {name} engine needs packages that are not installed ({error}): "
            f"pip install 'sessile-server[{name}]'"
        ) from error
    assert isinstance(backend, Backend)
    return backend


def parse_options(config: type[Config], options: Mapping[str, str]) -> Config:
    """A frozen config dataclass from text options: its fields, and those of configs within it.
    Raises ValueError naming the option and what it could be."""
    known = sorted(_options(config))
    for name in options:
        if name not in known:
            raise ValueError(f"option {name!r} is not one of {', '.join(known)}")
    return _build(config, options)


def _options(config: type[Any]) -> Iterator[str]:
    for name, hint in typing.get_type_hints(config).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint)
        else:
            yield name


def _build(config: type[Config], options: Mapping[str, str]) -> Config:
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(config).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[name] = _build(hint, options)
        elif name in options:
            values[name] = _parse(name, options[name], hint)
    return config(**values)


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType]
    for kind in kinds:
        if kind is bool:
            if text in ("true", "false"):
                return text == "true"
        elif kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"option {name}={text!r} must be {expected}")
