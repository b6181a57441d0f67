"""Where settings come from: a TOML file, the environment, the command line. Each is a tree of
:class:`Given` by name; later ones win, value by value, and a value remembers where it is from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES = ("gateway", "worker")
"""Tables of the file: one for each kind of process."""
COMMON = "common"
"""Table of the file for settings that every process has; a process's own table wins over it."""
CONFIG_VARIABLE = "SESSILE_CONFIG"
ALIASES = {
    "SESSILE_REDIS": (COMMON, "redis_url"),
    "SESSILE_LOG_LEVEL": (COMMON, "telemetry", "log_level"),
}
"""Variables with names of their own."""
PREFIXES = {f"SESSILE_{name.upper()}__": name for name in (*PROCESSES, COMMON)}
"""Beginning of a variable -> the table that it is in; ``__`` is between the names of a path."""


class SettingsRefused(ValueError):
    """Settings that cannot be used. ``problems`` are sentences with their fix, one each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Given:
    """One value as somebody wrote it."""

    value: Any
    origin: str
    """In words for people: a file, a variable, a flag."""
    text: bool = False
    """Of the environment or a flag: text that stands for what the setting's type says."""
    folder: Path | None = None
    """What relative paths in it are relative to; None: the current directory."""


Tree = dict[str, "Given | Tree"]


def from_file(path: Path) -> Tree:
    """Raises SettingsRefused for a file that cannot be read or is not TOML."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise SettingsRefused([f"the configuration file cannot be read: {error}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsRefused([f"{path} is not TOML: {error}"]) from error
    return _given(content, str(path), path.absolute().parent)


def from_environment(environment: Mapping[str, str]) -> Tree:
    """Variables that begin like :data:`PREFIXES`, and :data:`ALIASES`, which yield to them."""
    tree: Tree = {}
    for variable, path in ALIASES.items():
        if environment.get(variable):
            put(tree, path, Given(environment[variable], variable, text=True))
    for variable in sorted(environment):
        for prefix, table in PREFIXES.items():
            if variable.startswith(prefix):
                names = variable.removeprefix(prefix).lower().split("__")
                put(tree, (table, *names), Given(environment[variable], variable, text=True))
    return tree


def from_assignments(assignments: Iterable[str], process: str) -> Tree:
    """``PATH=VALUE`` texts of ``--set``; a path may leave out the process's own table."""
    tree: Tree = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        names = tuple(name.strip().replace("-", "_") for name in path.split("."))
        if not equals or not all(names):
            raise SettingsRefused(
                [f"--set takes PATH=VALUE, as in times.fleet_poll_s=0.5, not {assignment!r}"]
            )
        if names[0] not in (*PROCESSES, COMMON):
            names = (process, *names)
        put(tree, names, Given(value, f"--set {path}", text=True))
    return tree


def from_flags(*flags: tuple[str, str, Any]) -> Tree:
    """Of (path within the process's table, flag, value); None: the flag was not given."""
    tree: Tree = {}
    for path, flag, value in flags:
        if value is not None:
            plain = str(value) if isinstance(value, Path) else value
            put(tree, tuple(path.split(".")), Given(plain, flag))
    return tree


def put(tree: Tree, path: tuple[str, ...], given: Given) -> None:
    """Sets one value in a tree. A value where a group has to be is replaced."""
    *groups, name = path
    for group in groups:
        inner = tree.get(group)
        if not isinstance(inner, dict):
            inner = tree[group] = {}
        tree = inner
    tree[name] = given


def merged(layers: Iterable[Tree]) -> Tree:
    """One tree; later layers win, value by value."""
    result: Tree = {}
    for layer in layers:
        for name, node in layer.items():
            before = result.get(name)
            if isinstance(node, dict):
                result[name] = merged([before if isinstance(before, dict) else {}, node])
            else:
                result[name] = node
    return result


def _given(table: Mapping[str, Any], origin: str, folder: Path) -> Tree:
    return {
        name: _given(value, origin, folder)
        if isinstance(value, dict)
        else Given(value, origin, folder=folder)
        for name, value in table.items()
    }


def as_tree(given: Given) -> Tree:
    """The tree of a table that came as one value (in an array, or as text)."""
    return {
        name: Given(value, given.origin, folder=given.folder)
        if not isinstance(value, dict)
        else as_tree(Given(value, given.origin, folder=given.folder))
        for name, value in given.value.items()
    }
